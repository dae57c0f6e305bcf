"""The log on stderr: plain lines or JSON, this program's own words at the level asked for, other libraries' warnings.

Three loggers are meant to be read by whoever runs a server. ``slora_jax.start`` has what a start has to say, and
``slora_jax.events`` what changes what is served: both are heard at every level but ``error``. ``slora_jax.requests``
has a line for each request, at ``info``. None of them is ever given the text of a prompt or an answer, or a key.
"""

import json
import logging
from datetime import UTC, datetime

_OWN = ("slora_jax", "pallas_kernels")
_HEARD = ("slora_jax.start", "slora_jax.events")


def set_up_logging(level: str, as_json: bool = False) -> None:
    """Sets up the log of this process.

    Args:
      level: "debug", "info", "warning" or "error", of this program's own loggers. Others say warnings and errors at
        most.
      as_json: write one JSON object a line.
    """
    own = getattr(logging, level.upper())
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonLines() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=max(own, logging.WARNING), handlers=[handler])
    for name in _OWN:
        logging.getLogger(name).setLevel(own)
    if level == "error":
        return
    for name in _HEARD:
        logging.getLogger(name).setLevel(min(own, logging.INFO))
    if not as_json:
        # What a start says stands as it is: it is read by somebody who waits for it.
        start = logging.getLogger("slora_jax.start")
        start.handlers = [logging.StreamHandler()]
        start.propagate = False


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message; and the record's ``fields``, where it has some."""

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str)

"""Reading HTTP off the wire: waitress's parser, less what makes it drop a connection or work without bound.

Whatever a client sends, its answer is a status with a sentence, and never a connection closed without one.
"""

import waitress.parser
from waitress.utilities import BadRequest, RequestEntityTooLarge

_LONGEST_CHUNK_LINE = 4096
_LONGEST_TRAILER = 64 * 2**10


class RequestParser(waitress.parser.HTTPRequestParser):
    """One request on its way in; for ``HTTPChannel.parser_class``."""

    path = ""  # waitress asks for it when a client goes away, of requests too that had none that could be read

    def received(self, data: bytes) -> int:
        consumed = super().received(data)
        if not self.completed:
            if self.body_rcv is None:
                self._look_at_headers()
            elif self.chunked:
                self._bound_chunks()
        if self.completed:
            # There is nothing to wait for: waitress would go on to wait for a body that does not come.
            self.expect_continue = False
        return consumed

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except (waitress.parser.ParsingError, waitress.parser.TransferEncodingNotImplemented):
            raise
        except ValueError as e:
            # From urllib for the target, and from int for a length of thousands of digits.
            raise waitress.parser.ParsingError(f"The target or a length cannot be read: {e}") from None
        if self.chunked and "CONTENT_LENGTH" in self.headers:
            # Two parties could see two different requests.
            raise waitress.parser.ParsingError("Content-Length and Transfer-Encoding exclude each other; send one")

    def _look_at_headers(self) -> None:
        """Ends what would never become headers, rather than waiting for the rest of them."""
        start = self.header_plus.lstrip()
        if start and not ord("!") <= start[0] <= ord("~"):
            self.error = BadRequest("This is no HTTP; the address of this server begins with http:// and not https://")
        elif b"\n\n" in start:
            self.error = BadRequest("Each line of the headers must end in CR LF")
        else:
            return
        self.completed = True

    def _bound_chunks(self) -> None:
        """Ends a body that is going to be too large, and a chunk's size or a trailer that goes on and on.

        Each piece of those two is joined to all of those before, so that the work grows with their square.
        """
        receiver = self.body_rcv
        if len(receiver.control_line) > _LONGEST_CHUNK_LINE:
            self.error = BadRequest(f"A chunk's size and extensions exceed {_LONGEST_CHUNK_LINE} bytes")
        elif len(receiver.trailer) > _LONGEST_TRAILER:
            self.error = BadRequest(f"The trailer exceeds {_LONGEST_TRAILER} bytes")
        elif receiver.chunk_remainder > self.adj.max_request_body_size:
            self.error = RequestEntityTooLarge(f"exceeds max_body of {self.adj.max_request_body_size}")
        else:
            return
        self.completed = True

"""Faces of the engine: HTTP server and notebook. May import engine, text, request, config, errors; nothing deeper."""

"""The protocol between processes: frames, messages, codec, session. Pure: bytes in, bytes out."""

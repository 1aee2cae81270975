"""Logs: one JSON object a line on standard error, with the id of the request that they are about."""

import contextvars
import json
import logging
import sys
import uuid
from datetime import UTC, datetime
from typing import Any

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
"""The request that the present task serves."""

_LONGEST = 128
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Writes a record and what was given as ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if here := request_id.get():
            line["request_id"] = here
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(level: str) -> None:
    """Log in JSON from now on; other packages only what they warn of."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("serve").setLevel(level.upper())
    logging.captureWarnings(capture=True)


def identify(given: str | None) -> str:
    """Return the id of a request: the client's, if it is fit for headers and logs, or a new one."""
    if given and len(given) <= _LONGEST and given.isascii() and given.isprintable():
        return given
    return uuid.uuid4().hex

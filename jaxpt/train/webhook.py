"""Notify a person by a webhook when a run ends, skips many updates or forgets.

The URL comes by the environment variable JAXPT_WEBHOOK and is written nowhere: whoever has it can
post. A knob would stand in config.json, in starts.jsonl and in the list of processes.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import urllib.request

import jax

from jaxpt import io
from jaxpt.spec import UserError

log = logging.getLogger(__name__)

VARIABLE = "JAXPT_WEBHOOK"
TIMEOUT_SECONDS = 10.0


def read_url() -> str:
    """Return the URL that the environment gives; "": none. Raise UserError if it is no URL."""
    url = os.environ.get(VARIABLE, "")
    if url and not url.startswith(("https://", "http://")):
        raise UserError(f"{VARIABLE}: expected a URL, https://..., got something else.")
    return url


class Webhook:
    """Posts messages, each by a thread that no step waits for. Failures are logged."""

    def __init__(self, run_dir: io.Path):
        """Take the URL from the environment; without one, or on other processes, post nothing."""
        self.run_dir = run_dir
        self.threads: list[threading.Thread] = []
        self.url = read_url() if jax.process_index() == 0 else ""

    def send(self, event: str, sentence: str) -> None:
        """Post {"text", "content", "event", "run", "host"}: Slack reads text, Discord content.

        Args:
            event: "stop", "skips" or "forgetting".
            sentence: what happened.
        """
        if not self.url:
            return
        text = f"{self.run_dir}: {sentence}"
        message = {"text": text, "content": text[:1900], "event": event}
        message |= {"run": str(self.run_dir), "host": socket.gethostname()}
        thread = threading.Thread(target=self.post, args=(message,), daemon=True)
        thread.start()
        self.threads.append(thread)

    def post(self, message: dict[str, str]) -> None:
        """Post a message; log a failure without the URL."""
        data = json.dumps(message).encode()
        headers = {"Content-Type": "application/json", "User-Agent": "jaxpt"}
        request = urllib.request.Request(self.url, data, headers)
        try:
            urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS).close()
        except (OSError, ValueError) as error:  # HTTPError, a name without address, a bad URL
            reason = f"{type(error).__name__} {getattr(error, 'code', '')}".strip()
            log.warning(f"{VARIABLE}: a message was not posted ({reason}). The run goes on.")

    def close(self) -> None:
        """Give what is being posted a moment."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        for thread in self.threads:
            thread.join(max(deadline - time.monotonic(), 0.0))

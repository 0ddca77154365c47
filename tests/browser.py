"""A page in a real browser: headless Chromium, what it drew, what it complained about, and what it asked for."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

NO_BROWSER = "no Chromium on this machine: install one (Debian: apt-get install chromium) or name it in REFRAG_CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--disable-component-update", "--disable-sync", "--disable-default-apps", "--disable-dev-shm-usage"),
    "--host-resolver-rules=MAP * ~NOTFOUND",  # nothing leaves this machine, whatever the page asks for
    *("--hide-scrollbars", "--enable-logging=stderr", "--virtual-time-budget=2000"),
)
_ITSELF = "not an origin"
_CONSOLE = re.compile(r":CONSOLE[:(]\d+\)?\] (.*)")


@dataclass(frozen=True, slots=True)
class Visit:
    """What became of one page."""

    console: tuple[str, ...]
    """Every message on the console, errors and blocked loads among them."""
    requests: tuple[str, ...]
    """Addresses of all requests but the page's own."""
    screenshot: Path


def find_browser() -> str | None:
    """The first of the usual names that is installed; REFRAG_CHROMIUM names another."""
    wanted = os.environ.get("REFRAG_CHROMIUM")
    return wanted or next((path for name in NAMES if (path := shutil.which(name))), None)


def visit(
    browser: str, page: Path, screenshot: Path, *, width: int = 1100, height: int = 3200, dark: bool = False
) -> Visit:
    """Open a local page and draw it."""
    with tempfile.TemporaryDirectory(prefix="refrag-chromium-") as profile:
        log = Path(profile) / "net.json"
        command = [browser, *_FLAGS, f"--user-data-dir={profile}/profile", f"--log-net-log={log}"]
        command += [f"--screenshot={screenshot}", f"--window-size={width},{height}"]
        command += ["--blink-settings=preferredColorScheme=0"] if dark else []
        done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=240, check=False)
        assert screenshot.is_file(), done.stderr
        requests = [address for address in requested(log.read_text()) if address != page.as_uri()]
    return Visit(tuple(_CONSOLE.findall(done.stderr)), tuple(requests), screenshot)


def requested(log: str) -> list[str]:
    """Addresses in a net log that pages asked for; the browser's own errands have no page that began them."""
    try:
        events = json.loads(log)["events"]
    except ValueError:  # cut off where the browser ended: the events are one a line
        lines = [line.rstrip().rstrip(",") for line in log.splitlines()]
        events = [json.loads(line) for line in lines if line.startswith('{"params"') and line.endswith("}")]
    found = [event.get("params", {}) for event in events]
    return sorted({entry["url"] for entry in found if "url" in entry and entry.get("initiator", _ITSELF) != _ITSELF})

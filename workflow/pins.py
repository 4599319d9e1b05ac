"""The pins of environment.yml and the lock made from them. Standard library only: it runs before anything is installed.

python -m workflow.pins check           is every pin of environment.yml in requirements.lock?
python -m workflow.pins conda           what conda itself has to install
python -m workflow.pins lock            resolve environment.yml afresh and write requirements.lock
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = """\
# Every package of the environment at its exact version. Made by `./run_all.sh lock` from environment.yml; do not edit.
"""
# torch depends on these on Linux only; other systems have no such wheels.
LINUX_ONLY = re.compile(r"(nvidia-|cuda-|triton$)")


def normalised(name: str) -> str:
    """A package name as the index compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def sections(text: str) -> tuple[list[str], list[str]]:
    """The entries of ``dependencies:`` in an environment.yml: (conda's own, those under ``pip:``)."""
    conda, pip, place = [], [], None
    for line in text.splitlines():
        line = line.split(" #")[0].rstrip()
        if not line or line.lstrip().startswith("#"):
            continue
        if not line[0].isspace():
            place = conda if line == "dependencies:" else None
        elif place is not None and line.strip() == "- pip:":
            place = pip
        elif place is not None:
            place.append(line.strip().removeprefix("- ").strip())
    return conda, pip


def missing(environment: str, lock: str) -> list[str]:
    """The pins of ``environment`` that ``lock`` does not hold at the same version."""
    locked = set()
    for line in lock.splitlines():
        pin = line.split("#")[0].split(";")[0].strip()
        if pin:
            locked.add(_key(pin))
    return [pin for pin in sections(environment)[1] if _key(pin) not in locked]


def _key(pin: str) -> tuple[str, str]:
    name, _, version = pin.partition("==")
    return normalised(name.strip()), version.strip()


def lock_lines(report: dict) -> list[str]:
    """Requirement lines, sorted, from what ``pip install --report`` would install."""
    pins = [(item["metadata"]["name"], item["metadata"]["version"]) for item in report["install"]]
    marker = '; sys_platform == "linux"'
    return [
        f"{name}=={version}{marker if LINUX_ONLY.match(normalised(name)) else ''}"
        for name, version in sorted(pins, key=lambda pin: normalised(pin[0]))
    ]


def resolve(pins: list[str]) -> dict:
    """What pip would install for ``pins`` into an empty environment; nothing is installed."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, report = Path(folder, "pins.txt"), Path(folder, "report.json")
        wanted.write_text("\n".join(pins) + "\n", encoding="utf-8")
        words = [
            "install",
            "--dry-run",
            "--ignore-installed",
            "--quiet",
            "--report",
            str(report),
            "-r",
            str(wanted),
        ]
        subprocess.run([sys.executable, "-m", "pip", *words], check=True)
        return json.loads(report.read_text(encoding="utf-8"))


def main(command: str) -> int:
    environment = (ROOT / "environment.yml").read_text(encoding="utf-8")
    lock = ROOT / "requirements.lock"
    if command == "conda":
        print("\n".join(sections(environment)[0]))
    elif command == "lock":
        lines = lock_lines(resolve(sections(environment)[1]))
        fresh = lock.with_suffix(".lock.new")
        fresh.write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")
        os.replace(fresh, lock)
        print(f"requirements.lock: {len(lines)} packages")
    elif command == "check":
        absent = missing(environment, lock.read_text(encoding="utf-8"))
        if absent:
            print(
                f"requirements.lock lacks {', '.join(absent)} of environment.yml: run ./run_all.sh lock",
                file=sys.stderr,
            )
            return 1
    else:
        print(f"unknown word {command!r}; allowed: check, conda, lock", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2] or [""]))

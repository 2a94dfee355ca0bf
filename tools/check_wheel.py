"""Build wheel and sdist, and use the wheel outside the repository: `make wheel`.

The wheel goes into an empty folder that comes before all else on the path; torch, transformers and the other
dependencies are those of the environment that runs this, to save gigabytes. Everything else that the README's
lines need must be in the wheel.
"""

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT = 8_000_000
"""Bytes that the wheel may have."""

READY = "import probeprune; print(probeprune.__file__)"


def main() -> None:
    """Build, look, install, run. Ends with an exception where anything is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        build = [sys.executable, "-m", "build", "--outdir", str(work / "dist"), str(ROOT)]
        subprocess.run([*build, "--no-isolation"], check=True, stdout=subprocess.DEVNULL)  # sdist, then wheel
        (wheel,) = (work / "dist").glob("*.whl")
        (sdist,) = (work / "dist").glob("*.tar.gz")
        size = wheel.stat().st_size
        print(f"{wheel.name}: {size / 1e6:.2f} MB; {sdist.name}: {sdist.stat().st_size / 1e6:.2f} MB")
        if size > LIMIT:
            raise SystemExit(f"the wheel has {size} bytes, more than {LIMIT}.")
        version = wheel.name.split("-")[1]
        _check_changelog(version)
        with zipfile.ZipFile(wheel) as files:
            names = files.namelist()
        for needed in ("probeprune/py.typed", "probeprune/experiment/preset_files/laptop.yaml"):
            if needed not in names:
                raise SystemExit(f"{needed} is not in the wheel.")
        place = work / "installed"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place)]
        subprocess.run([*pip, str(wheel)], check=True)
        _use(place, work, version)


def _check_changelog(version: str) -> None:
    """End with a sentence where a release has no section of its own, right behind an empty `Unreleased`."""
    if ".dev" in version:
        return
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[([^\]]+)\].*\n((?:(?!## \[).*\n)*)", text, re.MULTILINE)
    if [name for name, _ in sections[:2]] != ["Unreleased", version] or sections[0][1].strip():
        raise SystemExit(f"CHANGELOG.md has no section [{version}] behind an empty [Unreleased].")


def _use(place: Path, work: Path, version: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(place), "HF_HUB_OFFLINE": "1"}

    def python(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], cwd=work, env=environment, check=True, capture_output=True, text=True
        )
        return done.stdout

    where = python("-c", READY).strip()
    if not Path(where).is_relative_to(place):
        raise SystemExit(f"{where} was imported in place of the wheel's.")
    said = python("-m", "probeprune", "--version").strip()
    if said != f"probeprune {version}":
        raise SystemExit(f"the wheel is version {version}, and the command line says: {said}.")
    print(said)
    python("-m", "probeprune", "methods", "--json")
    python("-m", "probeprune", "table", "--preset", "laptop", "--show")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    snippet = re.sub(r"count=\d+, length=\d+", "count=8, length=64", snippet)
    printed = python("-c", snippet.replace("best-dynamic", "probe"))  # seconds in place of minutes
    if "The capital of France is" not in printed:
        raise SystemExit("the README's example printed something else.")
    print("the README's lines run outside of the repository")


if __name__ == "__main__":
    main()

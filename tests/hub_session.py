"""What one user does on the hub, in a process whose client has a stub for a hub; `test_share.py` starts it.

Prints one JSON line of what happened. The client reads its settings once, when it is imported.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from hub_stub import TOKEN, Hub

place = Path(sys.argv[1])
hub = Hub()
os.environ.update(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_HOME=str(place / "hf"), HF_HUB_DISABLE_XET="1")
os.environ.update(PROBEPRUNE_CACHE=str(place / "cache"), HF_HUB_DISABLE_TELEMETRY="1")
for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_TOKEN_PATH"):
    os.environ.pop(name, None)
os.environ["HF_TOKEN_PATH"] = str(place / "token")

import torch  # noqa: E402

import probeprune  # noqa: E402
from probeprune.cli import app, run  # noqa: E402
from probeprune.data.corpora import load_corpus  # noqa: E402
from probeprune.model import loading  # noqa: E402

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def said(*words: str) -> tuple[int, str]:
    """Exit code and standard error of a command."""
    with contextlib.redirect_stderr(io.StringIO()) as error, contextlib.redirect_stdout(io.StringIO()):
        probeprune.cli.terminal.err.file = error
        code = run(lambda: app(["push", *words]))
    return code, error.getvalue()


def logits(name: str) -> torch.Tensor:
    """Those of a model by name, in float32."""
    return probeprune.load_model(name, dtype="float32").model(IDS).logits


found: dict[str, object] = {}
kept, cut = str(place / "kept"), str(place / "cut")
found["no token"] = said(kept, "me/kept")
(place / "token").write_text("hf_wrong")
found["wrong token"] = said(kept, "me/kept")
(place / "token").write_text(TOKEN)
found["not mine"] = said(kept, "you/kept")
found["no name"] = said(kept, "me/a b")
found["no owner"] = said(kept, "kept")
(place / "empty").mkdir()
found["no model"] = said(str(place / "empty"), "me/kept")
found["pushed"] = said(kept, "me/kept", "--private")
found["again"] = said(kept, "me/kept", "--results", str(place / "eval.json"))
smaller = loading.load_model(cut, dtype="float32")
probeprune.save(smaller.model, place / "again", tokenizer=smaller.tokenizer, push_to_hub="me/cut")
found["public"] = said(cut, "me/cut", "--private")
found["same"] = [
    logits("me/kept").equal(logits(kept)),
    logits("me/cut").equal(logits(cut)),
    probeprune.load_model("me/kept", dtype="float32").handle.method.name,
]
try:
    loading.load_model("me/kept", dtype="float32")
except probeprune.UsageError as error:
    found["dense"] = str(error)
hub.repos["datasets", "me/texts"] = {"train.jsonl": b'{"text": "one two"}\n{"text": "three"}\n'}
found["texts"] = load_corpus("me/texts")
found["card"] = hub.repos["models", "me/kept"]["README.md"].decode()
found["files"] = {name: sorted(files) for (_, name), files in hub.repos.items()}
found["private"], found["commits"] = sorted(hub.private), list(hub.commits)
hub.close()
found["unreachable"] = said(kept, "me/other")
print(json.dumps(found))

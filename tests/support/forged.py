"""Checkpoints that are forged: changed, with all checksums right, as an attacker or a strange tool would."""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def rewrite(checkpoint: Path, key: str, value: Any) -> None:
    """Change a key of a checkpoint's manifest, or, by `...`, leave it out."""
    path = checkpoint / "manifest.json"
    record = json.loads(path.read_bytes())
    del record["sha256"]
    path.write_bytes(sealed({k: v for k, v in {**record, key: value}.items() if v is not ...}))


def sealed(record: dict[str, Any]) -> bytes:
    """Return a manifest with its checksum."""
    body = json.dumps(record, indent=1).removesuffix("\n}")
    return f'{body},\n "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}'.encode()


def replace_file(checkpoint: Path, name: str, content: bytes) -> None:
    """Put another file into a checkpoint, and its size and checksum into the manifest."""
    (checkpoint / name).write_bytes(content)
    files = json.loads((checkpoint / "manifest.json").read_bytes())["files"]
    entry = {"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite(checkpoint, "files", [entry if one["name"] == name else one for one in files])


def repacked(
    tree: Any,
    change: Callable[[str, bytes], bytes] = lambda name, content: content,
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """Return what `torch.save()` writes of a tree, packed anew, with each record changed: `change(name, content)`."""
    saved, packed = io.BytesIO(), io.BytesIO()
    torch.save(tree, saved)
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(packed, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename.partition("/")[2], old.read(entry)))
    return packed.getvalue()

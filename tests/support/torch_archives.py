"""Files laid out as torch.save does it."""

from __future__ import annotations

import zipfile
from pathlib import Path

NAME = "model_world_size_1_rank_0.pt"


def archive(path: Path, content: bytes, **records: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("x/data.pkl", content)
        for record, data in records.items():
            made.writestr(f"x/{record}", data)
    return path

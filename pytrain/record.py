"""What a run folder and each checkpoint say about how they came to be."""

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytrain.errors import UserError

if TYPE_CHECKING:
    from pytrain.config import RunConfig
    from pytrain.data.loader import HeldOut, Loader
    from pytrain.grid import Grid

RUN_TOML, RECORD = "run.toml", "record.json"


def run_record(
    config: "RunConfig",
    grid: "Grid",
    ranks: list[tuple[str, str]],
    tokenizer_sha256: str,
    loader: "Loader",
    heldout: "list[HeldOut]",
) -> dict[str, Any]:
    """Version, machine, libraries, grid, seed and hashes of all that the result hangs on, as JSON values.

    `ranks` has of each its host, and what moves its messages on.
    """
    from pytrain import information
    from pytrain.native import native

    corpora = dict(zip(loader.names, loader.sidecars, strict=True)) | {
        corpus.name: corpus.sidecar for corpus in heldout
    }
    return {
        "pytrain": information.version(),
        "commit": information.commit(),
        "native": native().information(
            fp16_chains=config.precision.fp16_sums == "chains", rocblas=config.run.hip_products == "rocblas"
        ),
        "python": platform.python_version(),
        "libraries": information.library_versions(),
        "hosts": sorted({host for host, _ in ranks}),
        "progress": sorted({progress for _, progress in ranks}),
        "cpu": information.cpu_model(),
        "threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "grid": {"dp": grid.dp, "pp": grid.pp, "tp": grid.tp},
        "seed": config.run.seed,
        "tokenizer_sha256": tokenizer_sha256,
        "corpora": {
            name: None if note is None else {"tokens": note.tokens, "sha256": note.sha256}
            for name, note in corpora.items()
        },
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_record(folder: Path, config: "RunConfig", record: dict[str, Any]) -> None:
    """RUN/run.toml, which repeats the run, and RUN/record.json.

    Raises:
        UserError: the folder cannot be written to.
    """
    from pytrain.config import resolved_toml

    try:
        (folder / RUN_TOML).write_text(resolved_toml(config), encoding="utf-8")
        (folder / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error.strerror}") from None

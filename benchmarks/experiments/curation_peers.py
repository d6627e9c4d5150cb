"""datatrove's own steps for the same work: `python -m benchmarks.experiments.curation_peers STEP IN OUT` runs one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read(source: Path) -> Any:
    """Make datatrove's reader of the corpus."""
    from datatrove.pipeline.readers.jsonl import JsonlReader

    return JsonlReader(str(source.parent), glob_pattern=source.name)


def write(out: Path) -> Any:
    """Make datatrove's writer."""
    from datatrove.pipeline.writers.jsonl import JsonlWriter

    return JsonlWriter(str(out / "kept"), output_filename="${rank}.jsonl.zst", compression="zstd")


def pipe(*steps: Any) -> None:
    """Run steps one after another in this process."""
    data = None
    for step in steps:
        data = step.run(data, 0, 1)
    for _ in data or ():
        pass


def exact_dedup(source: Path, out: Path) -> None:
    """Deduplicate by datatrove's three stages."""
    from datatrove.pipeline.dedup.exact_dedup import (
        ExactDedupConfig,
        ExactDedupFilter,
        ExactDedupSignature,
        ExactFindDedups,
    )

    config = ExactDedupConfig(content_getter=lambda document: " ".join(document.text.lower().split()).encode())
    pipe(read(source), ExactDedupSignature(str(out / "signatures"), config))
    pipe(ExactFindDedups(str(out / "signatures"), str(out / "found"), config))
    pipe(read(source), ExactDedupFilter(str(out / "found"), config), write(out))


def near_dedup(source: Path, out: Path) -> None:
    """Deduplicate by datatrove's four stages, with its defaults but for the hash."""
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.utils.hashing import HashConfig

    # Its default hash, xxhash64, gets text here, which xxhash 4 refuses.
    config = MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))
    pipe(read(source), MinhashDedupSignature(str(out / "signatures"), config))
    for rank in range(config.num_buckets):
        MinhashDedupBuckets(str(out / "signatures"), str(out / "buckets"), config=config).run(
            None, rank, config.num_buckets
        )
    MinhashDedupCluster(str(out / "buckets"), str(out / "removed"), config=config).run(None, 0, 1)
    pipe(read(source), MinhashDedupFilter(str(out / "removed")), write(out))


def rules(source: Path, out: Path) -> None:
    """Filter by Gopher's rules, which `curate rules` calls, too."""
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter

    pipe(read(source), GopherQualityFilter(), GopherRepetitionFilter(), write(out))


STEPS: dict[str, Callable[[Path, Path], None]] = {"exact-dedup": exact_dedup, "near-dedup": near_dedup, "rules": rules}


def main() -> None:
    """Run one step."""
    if len(sys.argv) != 4 or sys.argv[1] not in STEPS:
        print(f"name a step of {', '.join(STEPS)}, the corpus and a new folder", file=sys.stderr)
        sys.exit(2)
    import datatrove.utils.logging  # noqa: F401, sets up the logger that is silenced next
    from loguru import logger

    logger.remove()
    STEPS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))


if __name__ == "__main__":
    main()

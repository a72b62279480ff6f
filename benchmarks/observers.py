"""What each observer costs a validation of a fine-tuned MiniLM, beside the same validation without it.

Run: ``python -m benchmarks.observers [--out FOLDER] [--quick]``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator

from benchmarks.runner import main
from benchmarks.table import Block, Setting, Table

SENTENCES = 256
NONE = "no observer"


def run(setting: Setting) -> Iterator[Block]:
    """Validate with each observer in turn, at its default settings."""
    from attn_callbacks import AttentionPaths, ErrorAnalysis, HeadImportance, HeadRoles
    from benchmarks import fits  # Lightning and transformers take seconds to import

    kinds = (*fits.OBSERVERS, HeadRoles, ErrorAnalysis, AttentionPaths, HeadImportance)
    with tempfile.TemporaryDirectory() as folder:
        if setting.quick:
            workload = fits.random_fine_tuning(16, 16, width=32, layers=2, heads=2)
        else:
            workload = fits.fine_tuning(16, SENTENCES)
        rows = len(workload.validation)
        arms = {NONE: fits.validation(workload, folder, list, rows)}
        arms |= {kind.__name__: fits.validation(workload, folder, lambda kind=kind: [kind()], rows) for kind in kinds}
        title = f"validation of {rows} sentences, with its log point; {workload.name}"
        yield Block("validation", title, setting.turns(arms, warm_up=1, pairs=7))


TABLE = Table("observers", "A validation with each observer, relative to the same without", (), run)

if __name__ == "__main__":
    sys.exit(main([TABLE.name, *sys.argv[1:]]))

"""Write the spreads that are shipped for plans, `seqdpo_utils/embedded/spreads.json`, from a finished study.

python tests/spreads.py <project in which a study was run> [scale]
"""

import sys
from pathlib import Path

from seqdpo_utils import power
from seqdpo_utils.paths import RunPaths, read_json, read_table, write_json


def content(root: Path, scale: str) -> dict:
    """`typical` spreads by quantity, and in words which study they are of."""
    table = read_table(RunPaths(root / "runs", scale, "").summary("spreads"))
    first = table.iloc[0]
    told = read_json(RunPaths(root / "runs", scale, first["setting"], first["chain"], 0).run_json)
    count = int(table["seeds"].max())
    asked, chains = told["parameters"], table[["setting", "chain"]].drop_duplicates()
    seeds = f"{count} seed{'s' if count > 1 else ''}"
    typical = power.typical(table).astype(object)
    return {
        "measured": f"the shipped {scale} study ({len(chains)} chains, {seeds})",
        "of": {name: asked[name] for name in ("base_model", "rows", "train_pairs", "eval_pairs", "beta")},
        "commit": told["commit"],
        "spreads": typical.where(typical.notna(), None).to_dict("index"),
    }


if __name__ == "__main__":
    print(write_json(power.SHIPPED, content(Path(sys.argv[1]), *(sys.argv[2:] or ["classroom"]))))

"""The experiments of other families than Wan, and of image to video: full size on the meta device, and what their first lines say is what a dry run says."""

from pathlib import Path

import pytest
import runs  # noqa: F401  registers the schema of train.py
from hydra import compose, initialize_config_dir

from usv.config import TrainConfig, check_train, typed
from usv.training.dry_run import GIB, report

CONF = Path(__file__).resolve().parents[2] / "conf"
TOKENS = {"usv_hunyuan": 33 * 34 * 60, "usv_hunyuan15": 31 * 30 * 53, "usv_cogvideox": 13 * 30 * 45, "usv_ltx": 21 * 16 * 22, "usv_wan_i2v": 21 * 30 * 52}
BILLIONS = {"usv_hunyuan": 12.8, "usv_hunyuan15": 8.3, "usv_cogvideox": 5.6, "usv_ltx": 1.9, "usv_wan_i2v": 16.4}  # of the public checkpoints


@pytest.mark.parametrize("name", TOKENS)
def test_the_first_lines_are_the_dry_runs(name, capsys):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = typed(compose("train", [f"experiment={name}"]), TrainConfig)
    check_train(config)
    found = report(config)
    out = capsys.readouterr().out
    assert f"{TOKENS[name]:,} tokens" in out
    parameters = next(role.parameters for role in found["roles"].values() if role.name.startswith("teacher"))
    assert abs(parameters / 1e9 - BILLIONS[name]) < 0.06
    said = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()[1]
    seconds = found["seconds"]
    assert f"experiment={name} " in said and f": {found['bytes'] / GIB:.0f} GiB, " in said
    assert f"{seconds:.0f} s a step" in said or f"{seconds:.1f} s a step" in said

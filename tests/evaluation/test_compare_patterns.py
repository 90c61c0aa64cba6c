"""usv/evaluation/compare_patterns.py and usv/evaluation/matched_density.py: equal executed densities, rows that survive a kill, the reports."""

import json

import pytest
import tiny
import torch
from pattern_reference import qkv

from usv.config import ModelConfig
from usv.evaluation import compare_patterns, compare_report
from usv.evaluation.matched_density import TOLERANCE, search_top_p, settings_for, svg_densities
from usv.patterns import PATTERNS, PatternState, attend, make_pattern
from usv.sparse.grid import TokenGrid

WAN_MINI = TokenGrid(9, 12, 12)


def heads():
    """Two heads that look at their frame, one at its place, one at what is alike: (1, 4, S, 12)."""
    token = torch.arange(WAN_MINI.num_tokens)
    frame, place = (torch.nn.functional.one_hot(x % 12, 12).float() for x in (token // 144, token % 144))
    x = torch.stack((frame, frame, place, torch.zeros_like(frame)))[None] * 6
    q, k, v = qkv(1, 4, WAN_MINI.num_tokens, 12)
    return x + q, x + k, v


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("density", [0.5, 0.3, 0.2])
def test_settings_execute_the_density_that_was_wanted(name, density):
    q, k, v = heads()
    own = {"q_clusters": 16, "k_clusters": 64, "first_iters": 4} if name == "svg2" else {}

    def measure(options):
        pattern = make_pattern(name, **options, dense_layers=0.0, dense_steps=0.0)
        executed = attend(q, k, v, WAN_MINI, pattern, PatternState())[1].density
        if name != "svg":
            return executed, 0.0
        spatial, temporal = svg_densities(WAN_MINI, options["density"], options["block"])
        return executed, (spatial - executed) / (spatial - temporal)

    options = settings_for(name, density, WAN_MINI, measure, own)
    assert measure(options)[0] == pytest.approx(density, rel=TOLERANCE)
    assert own.items() <= options.items()


def test_top_p_is_found_in_few_runs():
    tried = []

    def executed(p):
        tried.append(p)
        return p**3

    assert search_top_p(0.3, executed) ** 3 == pytest.approx(0.3, rel=0.02) and len(tried) <= 8
    assert search_top_p(0.001, lambda p: 0.2, rounds=3) > 0, "a floor that cannot be undercut ends too"


@pytest.fixture
def command(tiny_wan, tmp_path, monkeypatch):
    """The command on the tiny model; metrics of networks are replaced, they have tests of their own."""
    monkeypatch.setattr(compare_patterns, "real_clips", lambda model, count: (torch.zeros(1, 3, 3, 8, 8), [0]))
    monkeypatch.setattr("usv.evaluation.worlds.CameraMotion.teller", lambda *a: None)
    monkeypatch.setattr(compare_patterns, "features", lambda *a: None)
    ran = []
    real = compare_patterns.Setup.run

    def run(self, label, *args, **kwargs):
        ran.append(label)
        return real(self, label, *args, **kwargs)

    def measured(setup, generation, twins, reference):
        error = 1.0 if twins is None else float((generation.videos - twins).square().mean())
        return {"psnr": 99.0 if error == 0 else error, "subject_accuracy": 0.5}

    monkeypatch.setattr(compare_patterns.Setup, "run", run)
    monkeypatch.setattr(compare_patterns, "measured", measured)
    shape = ModelConfig(height=tiny.SIZE, width=tiny.SIZE, num_frames=tiny.FRAMES, max_sequence_length=tiny.TEXT, tile=list(tiny.TILE))

    def main(*words):
        ran.clear()
        base = ["--model", str(tiny_wan), "--clips", "2", "--steps", "3", "--densities", "0.6", "--clusters", "4", "20",
                "--dense-steps", "0.3", "--calibration-clips", "1", "--out", str(tmp_path / "a" / "r.json"),
                "--cache", str(tmp_path / "cache"), "--methods"]  # fmt: skip
        return compare_patterns.main([*base, *words], shape), list(ran)

    return main


def test_rows_survive_a_kill_and_are_not_run_again(command, tmp_path, monkeypatch):
    out = tmp_path / "a" / "r.json"
    real = compare_patterns.row_of

    def killed(name, *args):
        if name == "svg2":
            raise KeyboardInterrupt
        return real(name, *args)

    monkeypatch.setattr(compare_patterns, "row_of", killed)
    with pytest.raises(KeyboardInterrupt):
        command("tile_top_k", "svg2", "svg")
    report = json.loads(out.read_text())
    assert [row["method"] for row in report["rows"]] == ["tile_top_k"] and "svg2 0.6" in report["calibration"]
    assert out.with_suffix(".md").exists() and out.with_suffix(".png").exists(), "what there is can be looked at"
    monkeypatch.setattr(compare_patterns, "row_of", real)
    report, ran = command("tile_top_k", "svg2", "svg")
    assert ran[0] == "svg2 0.6" and "dense" not in ran and "tile_top_k 0.6" not in ran
    assert [row["method"] for row in report["rows"]] == ["tile_top_k", "svg2", "svg"]
    assert report["rows"][0] == json.loads(out.read_text())["rows"][0]
    two = report["rows"][1]
    # 3 steps × 2 branches × 2 layers for one batch; one step and one layer are dense.
    assert two["attention_calls"] == {"dense": 8, "sparse": 4}
    # One clip of 80 tokens says little about two others: what was executed is reported, and whether it is what was wanted.
    assert two["executed"] == pytest.approx(0.6, rel=0.25) and 0 < two["recall"] < 1
    assert two["matched"] == (abs(two["executed"] / 0.6 - 1) <= TOLERANCE)
    assert two["density_with_warm_up"] == pytest.approx((8 + 4 * two["executed"]) / 12, abs=1e-3)
    assert two["seconds"]["cluster"] > 0 and two["seconds"]["total"] > two["seconds"]["attention"] > 0
    assert command("tile_top_k", "svg2", "svg")[1] == []
    report, ran = command("tile_top_k", "svg2", "svg", "--clusters", "5", "20")
    assert {label.split()[0] for label in ran} == {"svg2"}, "other clusters are svg2's affair alone"
    assert [row["method"] for row in report["rows"]] == ["tile_top_k", "svg", "svg2"] and report["rows"][2]["options"]["q_clusters"] == 5
    _, ran = command("tile_top_k", "--guidance", "1")
    assert ran[0] == "dense", "other settings begin anew"


def report_of(*rows):
    settings = {"clips": 2, "steps": 3, "guidance": 3.0, "dense_steps": 0.2, "dense_layers": 0.03}
    return {"settings": settings, "machine": {"device": "cpu", "threads": 1}, "commit": "abc",
            "dense": {"seconds": {"total": 7.6}, "subject_accuracy": 0.5}, "rows": list(rows)}  # fmt: skip


def row(method, wanted, recall, matched=True):
    return {"method": method, "wanted": wanted, "executed": wanted, "matched": matched, "recall": recall, "psnr": 20.0 + wanted,
            "seconds": {"attention": 1.0, "total": 5.0}}  # fmt: skip


def test_table_claims_and_plot(tmp_path):
    report = report_of(row("svg", 0.2, 0.7), row("svg2", 0.2, 0.8), row("svg", 0.5, 0.9, matched=False), row("svg2", 0.5, 0.85))
    lines = compare_report.lines_of(report)
    assert [line[:3] for line in lines[1:]] == [("dense", "1.000", "–"), ("svg", "0.500*", "0.900"), ("svg2", "0.500", "0.850"),
                                                ("svg", "0.200", "0.700"), ("svg2", "0.200", "0.800")]  # fmt: skip
    assert compare_report.claims(report) == ["density 0.5: recall of SVG2 0.850 < 0.900 of SVG",
                                             "density 0.2: recall of SVG2 0.800 ≥ 0.700 of SVG"]  # fmt: skip
    report["rows"].append(row("sliding_tile", 1.0, None) | {"psnr": None})  # equal to the dense videos: JSON has no infinity
    assert compare_report.lines_of(report)[2][:4] == ("sliding_tile", "1.000", "–", "–")
    text = compare_report.markdown(report)
    assert "| svg2 | 0.200 | 0.800 | 20.20 |" in text and "first 20% of the steps" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    compare_report.publish(report, tmp_path / "r.json")
    assert (tmp_path / "r.png").stat().st_size > 10_000 and (tmp_path / "r.md").read_text() == text


@pytest.mark.parametrize("words", [["--densities", "1.5"], ["--calibration-clips", "9", "--clips", "4"], ["--methods", "svg3"]])
def test_wrong_arguments_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        compare_patterns.parse(words)
    assert words[0] in capsys.readouterr().err

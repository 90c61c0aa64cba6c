"""usv/evaluation/report: figures are those of the files, pictures are well formed, nothing needs a network; and a real browser shows it."""

import base64
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import av
import browser
import pytest
import torch
from strange import MARKUP, altered

from usv.evaluation.report import __main__ as command
from usv.evaluation.report.front import family_of, front, points_of, uncovered
from usv.evaluation.report.inputs import gather, kind_of
from usv.evaluation.report.page import NAMES, STYLE, page
from usv.evaluation.report.readme import refreshed, tables
from usv.evaluation.report.sections import CLASSES, MAKES, MOST_VIDEOS
from usv.evaluation.report.svg import Axis, Labels
from usv.sparse.plan import Rung, SparsityPlan
from usv.video import write_mp4

ROOT = Path(__file__).resolve().parents[2]
VOID = {"meta", "link", "br", "img", "hr", "input", "wbr"}


def row(family, seconds, subject, **more):
    values = {"subject_accuracy": subject, "subject_accuracy_low": subject - 0.1, "subject_accuracy_high": subject + 0.1}
    more = {"frechet_distance": 2000 - 100 * subject, "motion_accuracy": subject / 2, **more}
    return {
        "family": family, "settings": f"{family} <x>", "forwards": 100, "attention_density": 0.5, "merged": 0.25,
        "denoise_seconds": seconds, "denoise_speedup": 8 / seconds, "denoise_seconds_by_batch": {"p10": seconds * 0.9, "p90": seconds * 1.1},
        **values, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Results, a student's config, a training log and videos, as the programs write them."""
    folder = tmp_path_factory.mktemp("report")
    peers = {
        "command": "python -m usv.peers --clips 32", "commit": "abc1234", "machine": {"device": "a CPU", "threads": 2}, "versions": {"torch": "2.13", "cache-dit": None},
        "clips": 32,
        "methods": {
            "dense": row("dense", 8.0, 0.9), "dense_20_steps": row("fewer steps", 3.2, 0.85, psnr=20.0, ssim=0.8),
            "pab": row("cache", 5.5, 0.875, psnr=31.25, ssim=0.95), "cache_dit": {"family": "cache", "settings": "", "reason": "not installed: pip install cache-dit"},
            "merge_0.5": row("merging", 5.0, 0.4, psnr=15.0, ssim=0.5), "svg": row("pattern", 7.0, 0.88, psnr=25.0, ssim=0.9),
            "mine": row("ours", 1.8, 0.8612), "few & fast": row("ours", 0.1, 0.6),
        },
    }  # fmt: skip
    (folder / "peers.json").write_text(json.dumps(peers))
    axes = {"command": "python -m usv.bench denoise", "environment": {"commit": "abc1234"}, "batch_size": 4, "interaction": {"all_three": 80.0, "steps": 25.0, "attention": 2.5, "merge": 1.6, "product": 100.0, "ratio": 0.8},
            "methods": {name: {"axes": name_of, "denoise_seconds": {"p50": 8.4}, "denoise_speedup": 3.0, "forwards": 2, "seconds_per_forward": {"p50": 0.6},
                               "density": 0.25, "merged": 0.4, "flops_ratio": 5.0, "overhead": 0.1} for name, name_of in (("dense", "dense"), ("mine", "all three"))}}  # fmt: skip
    (folder / "axes.json").write_text(json.dumps(axes))
    policies = {"command": "python -m usv.compare_policies", "commit": "abc", "seeds": 3, "runs": {},
                "rows": {"gumbel": {"velocity_error_mean": 0.1, "velocity_error_std": 0.01, "plan_cost_mean": 0.3, "learned_is_better_in": 0}}}  # fmt: skip
    (folder / "policies.json").write_text(json.dumps(policies))
    plan = SparsityPlan((300.0, 750.0, 1000.0), ((Rung(3, 0), Rung(1, 2)), (Rung(0, 0), Rung(5, 3)), (Rung(2, 1), Rung(2, 0))))
    config = {"format": "usv-student-1", "transformer": {}, "tile": [3, 4, 4], "plan": plan.to_dict(), "training": {},
              "sampling": {"student_timesteps": [1000.0, 750.0], "num_inference_steps": 2}}  # fmt: skip
    (folder / "run" / "student").mkdir(parents=True)
    (folder / "run" / "student" / "config.json").write_text(json.dumps(config))
    log = [{"step": s, "loss/velocity": 1 / s, "sparsity/density": 1 - s / 200, "sparsity/cost": 0.5} for s in range(1, 101)]
    (folder / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, log)) + '\n{"step": 101, "lo')
    entries = []
    for index, prompt in enumerate(("a cat <b>, the camera pans left", "a rocket")):
        for name in ("dense", "pab", "svg", "mine"):
            file = f"{index}-{name}.mp4"
            write_mp4(folder / "videos" / file, torch.rand(9, 3, 48, 48, generator=torch.Generator().manual_seed(index)), scale=2)
            entries.append({"file": file, "prompt": prompt, "seed": index, "methods": [name]})
    (folder / "videos" / "videos.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def made(files):
    """The page, from the command."""
    out = files / "report.html"
    words = ["--results", *map(str, [files / "peers.json", files / "axes.json", files / "policies.json", ROOT / "data" / "results" / "attention_cpu.json"]),
             "--student", f"few={files / 'run' / 'student'}", "--curves", str(files / "run" / "metrics.jsonl"), "--videos", str(files / "videos"), "--out", str(out)]  # fmt: skip
    assert command.main(words) == out
    return out


class Strict(HTMLParser):
    """Every tag that opens closes, in order; collects what elements refer to."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.ids = [], [], []

    def handle_starttag(self, name, attributes):
        assert len({k for k, _ in attributes}) == len(attributes), f"<{name}> repeats an attribute"
        self.links += [v for k, v in attributes if k in ("src", "href", "poster", "data")]
        self.ids += [v for k, v in attributes if k == "id"]
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open and self.open[-1] == name, f"</{name}> closes {self.open[-3:]}"
        self.open.pop()


def parsed(text):
    parser = Strict()
    parser.feed(text)
    parser.close()
    assert not parser.open, f"never closed: {parser.open}"
    return parser


def test_the_page_is_well_formed_and_needs_nothing(made):
    text = made.read_text()
    document = parsed(text)
    assert len(set(document.ids)) == len(document.ids) and set(NAMES) == set(document.ids)
    assert all(link.startswith(("#", "data:")) for link in document.links) and all(f"#{name}" in document.links for name in NAMES)
    assert "<script" not in text and "url(" not in text and "@import" not in text
    for drawn in re.findall(r"<svg.*?</svg>", text, re.S):
        root = ElementTree.fromstring(drawn if "xmlns" in drawn else drawn.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1))
        if root.get("role") == "img":
            names = [child.tag.split("}")[1] for child in root][:2]
            assert names == ["title", "desc"] and root[0].text and root[1].text
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"base64,[^\"]*", "", text)), "a figure that is none"


def test_every_video_decodes(made):
    found = re.findall(r'src="data:video/mp4;base64,([^"]*)"', made.read_text())
    assert len(found) == 8
    for data in found:
        with av.open(BytesIO(base64.b64decode(data, validate=True))) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert sum(1 for _ in container.decode(video=0)) == 9
    assert made.read_text().count("muted autoplay loop playsinline") == 8


def test_figures_are_those_of_the_files(made):
    text = made.read_text()
    for words in ("31.2", "0.861 <small>(0.76–0.96)</small>", "1.800", "not installed: pip install cache-dit", "abc1234", "python -m usv.peers --clips 32"):
        assert words in text, words
    assert '<p class="big">4.4×</p>' in text, "8.0 / 1.8"
    assert "few &amp; fast" in text and "a cat &lt;b&gt;" in text and "<b>, the" not in text
    kernels = json.loads((ROOT / "data" / "results" / "attention_cpu.json").read_text())["rows"]
    assert "Runs at timesteps 1000, 750 (marked)" in text and all(f"{row['speedup_over_sdpa']:.2f}×" in text for row in kernels)
    assert "timesteps up to 750: density 1/32" in text and "timesteps up to 750: merge 75%" in text
    assert "a line that is no JSON, left out" in text
    row_of = re.search(r'<tr><th scope="row">mine</th><td>all three</td>.*?</tr>', text).group()
    assert "<td>2.100</td>" in row_of and "<td>0.1500</td>" in row_of, "seconds of a batch of four"
    assert "0.861 <small>" in row_of and "of which it is 0.80" in text, "times and quality of the same rows side by side"


def test_an_empty_page_says_how_to_fill_it():
    text = page(gather([], {}, [], []), "python -m usv.report", "none")
    parsed(text)
    from html import escape

    for key, makes in MAKES.items():
        if key != "peers" or "Not compared" in text:
            assert escape(makes) in text, f"no word of {key}"


def test_tables_of_a_readme_are_replaced(files):
    report = json.loads((files / "peers.json").read_text())
    (table,) = tables(gather([files / "peers.json"], {}, [], []))
    heading = table.split("\n")[0]
    text = f"# A\n\n| other |\n|---|\n| 1 |\n\n{heading}\n|---|\n| old | row |\n\nafter\n"
    new = refreshed(text, table)
    assert new == f"# A\n\n| other |\n|---|\n| 1 |\n\n{table}\n\nafter\n" and refreshed(new, table) == new
    assert refreshed("no table", table) == "no table"
    assert f"| mine | ours | 1.800 | {report['methods']['mine']['denoise_speedup']:.1f}× |" in table and "pip install cache-dit" in table
    assert {line.count("|") for line in table.splitlines()} == {12}


def test_the_plot_stands_alone(files, capsys):
    """With its own colours and a legend of the families that are in it, inside the picture."""
    out, quality = files / "plot.svg", "peers.json:subject_accuracy"
    (files / "bare.json").write_text(json.dumps({"methods": {"dense": row("dense", 8, 0.9)}}))
    words = ["--results", str(files / "peers.json"), str(files / "bare.json"), "--out", str(files / "other.html")]
    command.main([*words, "--picture", f"{out}={quality}", "--picture", f"{files / 'none.svg'}=gone.json:psnr", "--picture", f"{files / 'none.svg'}=bare.json:psnr"])
    said = capsys.readouterr().out
    assert "gone.json: no such comparison" in said and "bare.json: no row has psnr" in said and not (files / "none.svg").exists()
    root = ElementTree.fromstring(out.read_text())
    _, _, width, height = map(float, root.get("viewBox").split())
    legend = {e.text: e for e in root.findall("{http://www.w3.org/2000/svg}text") if e.get("class") == "tick" and not e.text[0].isdigit()}
    assert {*legend} == {"dense", "fewer steps", "cache", "merging", "pattern", "ours", "front of ours", "front of all others"}
    assert all(float(e.get("y")) < height and float(e.get("x")) + 7 * len(words) < width for words, e in legend.items())
    for wrong in ("plot.svg", f"{out}=peers.json", f"{out}=peers.json:beauty"):
        with pytest.raises(SystemExit):
            command.main([*words, "--picture", wrong])
    assert "got 'plot.svg', accepted: FILE.svg=RESULT.json:QUALITY" in capsys.readouterr().err
    style = root.find("{http://www.w3.org/2000/svg}style").text
    assert "--ours" in style and "prefers-color-scheme: dark" in style and "body" not in style and style.count("{") == style.count("}")


def test_damaged_inputs_are_named(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    inputs = gather([tmp_path / "bad.json", tmp_path / "list.json"], {"gone": tmp_path / "gone"}, [tmp_path / "no.jsonl"], [tmp_path / "videos"])
    assert len(inputs.problems) == 5 and not inputs.students
    text = page(inputs, "", "")
    assert all(name in text for name in ("bad.json", "list.json", "gone", "no.jsonl", "no such folder of videos"))


def test_results_are_known_by_what_they_hold():
    kinds = {path.name: kind_of(json.loads(path.read_text())) for path in (ROOT / "data" / "results").glob("*.json")}
    assert kinds["usv_mini.json"] == "comparison" and kinds["attention_cpu.json"] == "kernels" and kinds["wan_mini_codec.json"] == "other"


def test_the_readmes_table_of_axes():
    """Seconds are of a clip, not of the batch; quality comes from the comparison that has the same rows."""
    times = {"batch_size": 4, "interaction": None, "methods": {"mine": {
        "axes": "all three", "denoise_seconds": {"p50": 8.4}, "denoise_speedup": 30.0, "forwards": 2, "seconds_per_forward": {"p50": 0.6}, "density": 0.25, "merged": 0.4,
    }}}  # fmt: skip
    inputs = gather([], {}, [], [])
    inputs.results["axes"]["a.json"] = times
    inputs.results["comparison"]["other.json"] = {"methods": {"dense": row("dense", 8, 0.9)}}
    assert tables(inputs)[0].endswith("| 2.100 | 30.0 | – | – | – |")
    inputs.results["comparison"]["same.json"] = {"methods": {"mine": row("ours", 1, 0.8612)}}
    assert tables(inputs)[0].split("\n")[2] == "| mine | all three | 2 | 0.1500 | 0.250 | 40% | 2.100 | 30.0 | 0.861 | 0.431 | 1914 |"


def test_fronts_and_defeats():
    methods = {"dense": row("dense", 8, 0.9), "a": row("cache", 4, 0.95), "b": row("cache", 4, 0.5), "mine": row("ours", 2, 0.88), "c": row("cache", 1, 0.2)}
    points = points_of({"methods": methods}, "subject_accuracy")
    assert [p.name for p in front(points, True)] == ["c", "mine", "a"]
    assert [(p.name, close) for p, close in uncovered(points, True)] == [("dense", True), ("a", True), ("c", False)]
    distance = points_of({"methods": methods}, "frechet_distance")
    assert [p.name for p in front(distance, False)] == ["c", "mine", "a"] and [p.name for p, _ in uncovered(distance, False)] == ["dense", "a", "c"]
    assert points_of({"methods": {"x": {"reason": "gone"}}}, "subject_accuracy") == []
    told = {name: family_of(name, {"denoise_seconds": 1.0}) for name in ("dense", "dense_4", "dense_1_unguided", "dense_student", "mine")} | {"lookup": family_of("lookup", {})}
    assert told == {"dense": "dense", "dense_4": "fewer steps", "dense_1_unguided": "fewer steps", "dense_student": "ours", "mine": "ours", "lookup": "no model"}


@pytest.mark.parametrize("low, high, log", [(0, 1, False), (0.05, 9.0, True), (1900, 2100, False), (3, 3, False), (2, 2, True), (1e-3, 1e3, True)])
def test_axes_hold_their_values_and_have_ticks(low, high, log):
    axis = Axis.around([low, high], 0, 100, log)
    assert 0 < axis.at(low) <= axis.at(high) < 100 and axis.low < low and high < axis.high
    ticks = axis.ticks()
    assert all(axis.low <= t <= axis.high for t in ticks) and len(ticks) <= 12
    assert len(ticks) >= 2 or low == high
    flipped = Axis.around([low, high], 0, 100, log, flipped=True)
    assert flipped.at(low) == pytest.approx(100 - axis.at(low))


def test_labels_never_cover_each_other():
    axes = Axis(0, 1, 0, 500), Axis(0, 1, 400, 0)
    labels, placed = Labels(*axes), 0
    for i in range(40):
        placed += bool(labels.place(f"label {i}", 200 + i % 5, 200 + i % 7))
    boxes = labels.taken
    assert 3 <= placed == len(boxes)
    for i, (a, b, c, d) in enumerate(boxes):
        assert all(c <= e or g <= a or d <= f or h <= b for e, f, g, h in boxes[:i])


def test_few_videos_are_chosen(files):
    entries = json.loads((files / "videos" / "videos.json").read_text())
    crowd = files / "crowd"
    crowd.mkdir(exist_ok=True)
    many = []
    for i in range(60):
        (crowd / f"{i}.mp4").write_bytes((files / "videos" / entries[0]["file"]).read_bytes())
        many.append({"file": f"{i}.mp4", "prompt": f"prompt {i // 20}", "seed": 0, "methods": [f"m{i % 20}"]})
    (crowd / "videos.json").write_text(json.dumps(many))
    text = page(gather([files / "peers.json"], {}, [], [crowd]), "", "")
    assert text.count("<video") == MOST_VIDEOS and f"{MOST_VIDEOS} of 60 clips" in text
    text = page(gather([files / "peers.json"], {}, [], [files / "videos"]), "", "")
    assert text.count("<video") == 8, "one cache and one pattern, the dense model and ours, for two prompts"


def test_every_family_has_a_colour():
    assert all(f".{name} " in STYLE for name in CLASSES)


@pytest.mark.skipif(browser.PATH is None, reason="no Chromium on this machine: apt-get install chromium")
def test_a_browser_shows_it(made, tmp_path):
    """No complaints, nothing loaded from elsewhere, videos play, pictures are visible and nothing sticks out on a phone."""
    page_of = browser.Browser(tmp_path / "profile")
    try:
        for width, dark in ((1280, False), (1280, True), (390, False)):
            page_of.open(made.as_uri(), width=width, dark=dark)
            assert page_of.complaints() == []
            assert page_of.run("document.documentElement.scrollWidth") <= width
            ground = [int(v) for v in re.findall(r"\d+", page_of.run("getComputedStyle(document.body).backgroundColor"))[:3]]
            assert max(ground) < 60 if dark else min(ground) > 200
            pictures = page_of.run("[...document.querySelectorAll('svg[role=img]')].map(s => {let b = s.getBoundingClientRect(); return [b.left, b.right, b.height]})")
            assert len(pictures) >= 8 and all(left >= 0 and right <= width and right - left > 250 and height > 80 for left, right, height in pictures)
            smallest = page_of.run("Math.min(...[...document.querySelectorAll('svg[role=img]')].flatMap(s => [...s.querySelectorAll('text')].map(t => parseFloat(getComputedStyle(t).fontSize) * s.getBoundingClientRect().width / s.viewBox.baseVal.width)))")
            assert smallest >= 10, "text in a picture is too small to read"
            outside = page_of.run("[...document.querySelectorAll('svg[role=img] text')].filter(t => {let a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect(); return a.left < b.left - 1 || a.right > b.right + 1 || a.bottom > b.bottom + 1}).map(t => t.textContent)")
            assert outside == []
        playing = page_of.run("new Promise(done => setTimeout(() => done([...document.querySelectorAll('video')].map(v => [v.error && v.error.message, v.videoWidth, v.readyState, v.loop])), 700))")
        assert all(video == [None, 96, 4, True] for video in playing) and len(playing) == 8
        page_of.run("document.querySelector('#videos').scrollIntoView()")
        moved = page_of.run("new Promise(done => setTimeout(() => done([...document.querySelectorAll('video')].filter(v => !v.paused && v.currentTime > 0).length), 900))")
        assert moved >= 4, "videos in view do not play"
    finally:
        page_of.close()


# ---- files of strangers ----------------------------------------------------------------------------------------------


def test_altered_inputs_never_cost_the_page(files, tmp_path):
    """Any value anywhere: a page comes out, well formed, what is whole still on it, and no markup of a file's reaches it."""
    kinds = [*((name, None) for name in ("peers.json", "axes.json", "policies.json")), ("run/student/config.json", "student")]
    kernels = json.loads((ROOT / "data" / "results" / "attention_cpu.json").read_text())
    (files / "kernels.json").write_text(json.dumps(kernels | {"rows": kernels["rows"][:2]}))
    for name, kind in [*kinds, ("kernels.json", None)]:
        for said, value in altered(json.loads((files / name).read_text()), 15):
            folder = tmp_path / "strange"
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text(json.dumps(value))
            results = [files / "bare.json"] + ([folder / "config.json"] if kind is None else [])
            (files / "bare.json").write_text(json.dumps({"methods": {"dense": row("dense", 8, 0.9), "whole": row("ours", 2, 0.8)}}))
            inputs = gather(results, {"s": folder} if kind else {}, [], [])
            text = page(inputs, "", "")
            text.encode()
            assert "<b title" not in text and "2.000" in text, said
            tables(inputs)
    parsed(text)
    lines = [json.dumps(value) for _, value in altered({"step": 1, "loss/velocity": 0.5, "sparsity/density": 0.5}, 60)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert "<b title" not in page(gather([], {}, [tmp_path / "metrics.jsonl"], []), "", "")


def test_a_page_holds_videos_of_their_folder_only(files, tmp_path):
    """Neither absolute names nor .. nor links: the page goes to others."""
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(b"the secret of this machine")
    folder = tmp_path / "videos"
    (folder / "sub").mkdir(parents=True)
    (folder / "link.mp4").symlink_to(secret)
    (folder / "sub" / "a.mp4").write_bytes(secret.read_bytes())
    os.mkfifo(folder / "pipe.mp4")
    (folder / "good.mp4").write_bytes((files / "videos" / "0-dense.mp4").read_bytes())
    names = [str(secret), "../secret.mp4", "link.mp4", "sub/a.mp4", "sub/../../secret.mp4", "pipe.mp4", "videos.json", ".", "", "good.mp4"]
    strange = [{"file": "good.mp4", "prompt": 3, "seed": MARKUP, "methods": 7}, {"file": 3}, "x", None]
    described = [{"file": name, "prompt": MARKUP, "seed": 1, "methods": [MARKUP]} for name in names] + strange
    (folder / "videos.json").write_text(json.dumps(described))
    inputs = gather([], {}, [], [folder])
    text = page(inputs, "", "")
    assert {v.path.name for v in inputs.videos} == {"good.mp4"} and base64.b64encode(b"the secret").decode()[:10] not in text and "<b title" not in text
    (folder / "videos.json").unlink()
    assert {v.path.name for v in gather([], {}, [], [folder]).videos} == {"good.mp4"}


def test_the_page_forbids_scripts_and_networks(made):
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', made.read_text())
    assert "default-src 'none'" in policy and "script-src" not in policy and "http" not in policy and "*" not in policy


@pytest.mark.parametrize("words", [["--results", "no.json"], ["--curves", "no.jsonl"], ["--videos", "no"], ["--student", "a=no"], ["--readme", "no.md"], ["--out", "."], ["--out", "mine.txt"], ["--picture", "mine.txt=a.json:psnr"]])
def test_what_was_named_and_is_not_there_ends_it(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        command.main([*words, *([] if "--out" in words else ["--out", "report.html"])])
    assert isinstance(caught.value.code, str) and caught.value.code.startswith(f"FileError: {words[0]}") and len(caught.value.code.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"] and (tmp_path / "mine.txt").read_text() == "mine"

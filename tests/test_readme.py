"""README.md is true: its links and paths exist, its commands parse against the programs they call, its Python names exist."""

import json
import re
import shlex
import subprocess
from pathlib import Path

from usv.config import InferConfig, TrainConfig, check_overrides, config_groups

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
MADE = ("outputs/", "data/shards/", "my_", "/")  # what commands make, or the reader brings


def text():
    return README.read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", text(), re.S)


def commands():
    lines = "\n".join(blocks("(?:bash|sh|shell)")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.split("#")[0].strip()]


def test_there_is_a_readme_with_commands():
    assert README.exists()
    assert [["make", "demo"], ["make", "test"]] == [c for c in commands() if c[0] == "make"][:2]
    assert any(c[-1] == "train.py" or "train.py" in c for c in commands()) and any("infer.py" in c for c in commands())


def test_links_lead_somewhere():
    links = [
        link.split("#")[0]
        for link in re.findall(r"\]\(([^)\s]+)\)", text())
        if not re.match(r"https?://|#|mailto:", link)
    ]
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing, f"README links to nothing: {missing}"


def test_paths_in_code_exist():
    """Every `a/b` in backticks and every path in a command, except what commands make."""
    inline = re.findall(r"`([\w.-]+(?:/[\w.*-]+)+/?)`", re.sub(r"```.*?```", "", text(), flags=re.S))
    words = [re.sub(r"^[\w.]+=", "", w) for c in commands() for w in c]
    words = [w for w in words if re.fullmatch(r"[\w.-]+(/[\w.-]+)+", w) or w.endswith(".py")]
    missing = [p for p in {*inline, *words} if not p.startswith(MADE) and not (ROOT / p).exists()]
    assert not missing, f"README names what is not there: {sorted(missing)}"


def tracked():
    """Files of the repository; outside a checkout, those that are there."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.splitlines() or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]


def test_commands_are_accepted_by_their_programs():
    groups = config_groups(ROOT / "conf")
    seen = set()
    for command in commands():
        for program, schema in (("train.py", TrainConfig), ("infer.py", InferConfig)):
            if program in command:
                check_overrides(command[command.index(program) + 1 :], schema, groups)
                seen.add(program)
        if command[0] == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
            assert set(command[1:]) <= set(targets)
        if "-m" in command and (module := command[command.index("-m") + 1]).startswith("usv"):
            source = (ROOT / "kernels" if module.startswith("usv_kernels") else ROOT) / module.replace(".", "/")
            source = next(p for p in (source.with_suffix(".py"), source / "__main__.py") if p.exists())
            if behind := re.search(r"^from (usv[\w.]+) import main$", source.read_text(), re.M):  # an entry of two lines
                source = (ROOT / behind[1].replace(".", "/")).with_suffix(".py")
            options(command, source)
        for script in (w for w in command if w.startswith("data/") and w.endswith(".py")):
            options(command, ROOT / script)
    assert seen == {"train.py", "infer.py"}


def options(command, source):
    """Every --option of a command is one that the source defines, or takes from data/arguments.py."""
    code = source.read_text()
    if "add_common(" in code:
        code += (ROOT / "data" / "arguments.py").read_text()
    for word in command:
        if word.startswith("--"):
            name = word.split("=")[0]
            known = f'"{name}"' in code or f'"{name[2:]}"' in code
            assert known, f"{source.name} has no option {name}"


def test_settings_named_in_the_text_exist():
    from usv.config import keys_of

    keys = {*keys_of(TrainConfig), *keys_of(InferConfig)}
    prose = re.sub(r"```.*?```", "", text(), flags=re.S)
    named = re.findall(r"`((?:model|policy|attention|objective|data|optim|runtime|logger)\.\w+)(?:=[^`]*)?`", prose)
    assert named and set(named) <= keys


def test_python_names_exist():
    import usv

    code = "\n".join(blocks("python"))
    compile(code, "README.md", "exec")
    for name in re.findall(r"usv\.(\w+)\(", code):
        assert callable(getattr(usv, name))


def test_make_targets_call_what_exists():
    makefile = (ROOT / "Makefile").read_text()
    for module in re.findall(r"-m (usv[\w.]*)", makefile):
        source = (ROOT / "kernels" if module.startswith("usv_kernels") else ROOT) / module.replace(".", "/")
        assert source.with_suffix(".py").exists() or (source / "__main__.py").exists(), module
    for script in re.findall(r"(\S+\.py)\b", makefile):
        assert (ROOT / script).exists(), script
    groups = config_groups(ROOT / "conf")
    commands = re.findall(r"(?:train\.py|\$\(TRAIN\)) ([^\n;|&]*)", makefile.replace("\\\n", " "))
    assert len(commands) >= 5, "demo, the ablation's two, the budgets', and what TRAIN itself is"
    for line in commands:
        check_overrides([word for word in line.split() if "$" not in word], TrainConfig, groups)
    parts = [part.split(":") for part in re.search(r"^PARTS +\?= (.*)$", makefile, re.M)[1].split()]
    assert [axes for _, axes, _ in parts] == ["[]", "[density]", "[merge]", "[density,merge]"]
    for _, axes, _ in parts:
        check_overrides([f"policy.axes={axes}"], TrainConfig, groups)
    singles = re.search(r"^SINGLE +\?= (.*)$", makefile, re.M)[1].split()
    assert {*singles} <= {name for part in parts for name in (part[0], part[2])}


def test_nothing_is_left_to_fill_in():
    holes = re.findall(r"^[A-Z]+_[A-Z_]+$|\bTODO\b|\bTBD\b|\bXXX\b", text(), re.M)
    assert not holes, f"README still holds {holes}"


def test_named_files_are_committed():
    """A clone has them: a path that exists here but is ignored or forgotten would break the README elsewhere."""
    files = tracked()
    links = [
        link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text()) if not re.match(r"https?://|#", link)
    ]
    missing = [link for link in links if not any(f == link or f.startswith(link.rstrip("/") + "/") for f in files)]
    assert not missing, f"not committed: {missing}"


def test_the_tables_are_what_was_measured():
    """Every figure of both tables comes from the committed JSON, through the function that prints it."""
    from usv.evaluation.judge import markdown
    from usv.evaluation.peers.__main__ import markdown as peers

    report, others = (json.loads((ROOT / "data" / "results" / f"{name}.json").read_text()) for name in ("usv_mini", "peers"))
    assert markdown(report) in text() and peers(others) in text()
    assert f"two CPU cores, {report['clips']} clips" in text() and f"use, {others['clips']} clips" in text()

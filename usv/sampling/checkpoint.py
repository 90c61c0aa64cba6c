"""A student on disk: config.json (model shape, plan, sampler) and student.safetensors (weights and gates), nothing pickled.

A folder is written beside its name and renamed when complete. Loading refuses what was made for another model or grid. Which
weights stand there, config.json says: all of them; adapters, merged into the model when loaded ("lora"); or only the gates,
the rest being the exported pipeline's own transformer ("fingerprint", usv/sampling/export.py).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from usv.files import atomic_folder, checksum, replacing, settle
from usv.models import lora
from usv.models.families import family_of
from usv.models.forward import SparseTransformer
from usv.patterns.processors import attached_to
from usv.sampling.fingerprint import check_base, quantised
from usv.sampling.record import CELL, CheckpointError, check_record, plan_of
from usv.sampling.wan_file import read_record, read_tensors
from usv.sparse.grid import Tile
from usv.sparse.plan import SparsityPlan

FORMAT = "usv-student-1"
READS = 3  # of a folder that is replaced while it is read
DENSE = "dense"  # what comparisons call the model itself


@dataclass
class Student:
    """A sparse network, the plan it runs, and how it is sampled (height, width, num_frames, num_inference_steps, …).

    policy: what its gates had learned (`run_state.policy_tables`). lora: rank, alpha, targets of `adapters` (a state dict of theirs), which `model`
    has merged in; None where all weights were trained. on_base: whether the weights that it was loaded with are the pipeline's own, but for
    gates and `adapters`. router: of the network only the gates were trained; guidance is then not folded in, and any copy of the base fits.
    base: `fingerprint` of the model it was trained from; None where nobody noted it.
    """

    model: SparseTransformer
    plan: SparsityPlan
    sampling: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    policy: dict = field(default_factory=dict)
    lora: dict | None = None
    adapters: dict | None = None
    on_base: bool = False
    router: bool = False
    base: dict | None = None

    def executed_plan(self) -> SparsityPlan:
        """The plan's rows at the timesteps that are sampled: of a few-step student its own, else all."""
        return self.plan.sampled(self.sampling.get("student_timesteps") or ())


def save_student(path: str | Path, student: Student) -> None:
    """Write a student folder. CheckpointError where a weight is not finite."""
    state, record = student.model.state_dict(), record_of(student)
    if student.adapters is not None:
        record["lora"] = student.lora
        gates = {name: value for name, value in state.items() if name.startswith("gates.")}
        state = {**gates, **lora.diffusers_names(student.adapters)}
    elif student.router:
        state = {name: value for name, value in state.items() if name.startswith("gates.")}

    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    if wrong := not_finite(tensors):
        raise CheckpointError(f"{path}: not saved, {wrong}; what stood there before still stands")

    def write(folder: Path) -> None:
        save_file(tensors, folder / "student.safetensors")
        record["checksum"] = checksum(folder / "student.safetensors")
        (folder / "config.json").write_text(json.dumps(record, indent=1))

    atomic_folder(Path(path), write)


def not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """A line about the first tensor with NaN or infinity; None where all are finite."""
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            return f"{name} is not finite in {int((~torch.isfinite(value)).sum())} of {value.numel()} places"
    return None


def record_of(student: Student) -> dict:
    """config.json of a student."""
    config = dict(student.model.config)
    return {
        "format": FORMAT,
        "family": student.model.family.name,
        "transformer": {key: config[key] for key in student.model.family.shape_keys},
        "tile": [student.model.tile.t, student.model.tile.h, student.model.tile.w],
        "cell": list(student.model.tile.cell),
        "plan": student.plan.to_dict(),
        "sampling": student.sampling,
        "training": student.training,
        "policy": student.policy,
        **({"router": True} if student.router else {}),
        **({} if student.base is None else {"base": student.base}),
    }


def read_config(path: str | Path) -> dict:
    """config.json of a student folder. CheckpointError where it is missing or something else."""
    path = Path(path)
    if path.suffix == ".safetensors":  # one file of usv.export
        return _checked(read_record(path), path)
    settle(path)
    if (path / "usv" / "config.json").exists():  # a pipeline folder of usv.export
        path = path / "usv"
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such checkpoint; give a folder written by train.py, e.g. ckpt=outputs/usv_mini/student"
        )
    file = path / "config.json"
    if not file.exists():
        inner = sorted(p.parent.name for p in path.glob("*/config.json"))
        hint = f"; it contains {', '.join(inner)}" if inner else ""
        raise CheckpointError(f"{path}: not a student folder (no config.json){hint}; give one written by train.py")
    try:
        record = json.loads(file.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable ({error}); the checkpoint is damaged, use another") from None
    return _checked(record, file)


def _checked(record, file: Path) -> dict:
    """A record as read from `file`. CheckpointError for one of somebody else, or damaged."""
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        record = record if isinstance(record, dict) else {}
        raise CheckpointError(
            f"{file}: a {record.get('_class_name', 'foreign')} config with format {record.get('format')!r}, expected "
            f"{FORMAT!r}; give a student folder written by train.py"
        )
    missing = [key for key in ("transformer", "tile", "plan", "sampling", "training") if key not in record]
    if missing:
        raise CheckpointError(f"{file}: lacks {', '.join(missing)}; the checkpoint is damaged, use another")
    check_record(record, file)
    return record


def named(entries: list[str]) -> dict[str, str]:
    """[name=]path arguments; the default name is the folder's, or the run's that it lies in. ValueError for a name given twice, and for
    the dense model's."""
    found: dict[str, str] = {}
    for entry in entries:
        name, _, path = entry.rpartition("=")
        folder = Path(path.partition("@")[0]).resolve()
        name = name or (folder.parent if folder.name == "student" else folder).name
        if not folder.name or not name or {"/", "\\", "\0"} & set(name):
            raise ValueError(f"students: got {entry!r}, accepted: FOLDER or name=FOLDER, the name without / and \\")
        if name == DENSE:
            raise ValueError(f"students: got the name {name!r}, which is the model's own, accepted: another, as in other={path}")
        if name in found:
            raise ValueError(f"students: got the name {name!r} twice, accepted: one name a student, as in other=FOLDER")
        found[name] = path
    return found


def load_student(path: str | Path, base: torch.nn.Module) -> Student:
    """A student for the model `base` belongs to. CheckpointError when shapes differ or a file is damaged."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return _load(path, read_config(path), base)
    for attempt in range(READS):
        record = read_config(path)
        folder = path / "usv" if (path / "usv" / "config.json").exists() else path
        try:
            return _load(folder, record, base)
        except CheckpointError:  # a training run may have put a newer student in its place between the two files
            if attempt == READS - 1 or read_config(path) == record:
                raise


def _load(path: Path, record: dict, base: torch.nn.Module) -> Student:
    """As `load_student`, from the folder that holds student.safetensors, or from one file."""
    one = path.suffix == ".safetensors"
    config, weights = (path, path) if one else (path / "config.json", path / "student.safetensors")
    check_fits(path, record.get("family", "wan"), record["transformer"], base)
    frozen = quantised(base) is not None
    if frozen:
        check_quantised(path, record, base)
    check_base(path, record, base, one)
    plan, tile = plan_of(record, config), Tile(*record["tile"], cell=tuple(record.get("cell", CELL)))
    transformer = twin(base) if frozen else type(base).from_config(base.config)
    if (pattern := attached_to(transformer)) is not None:
        pattern.undo()  # of a quantised base that is under one: its twin is, too
    layers = len(family_of(transformer).layers(transformer))
    if plan.num_layers != layers:
        raise CheckpointError(
            f"{config}: a plan of {plan.num_layers} layers for a model of {layers}; use another checkpoint"
        )
    model = SparseTransformer(transformer, tile)
    tensors = read_tensors(path, record) if one else read_weights(path, record)
    if one and (wrong := not_finite(tensors)):
        raise CheckpointError(f"{path}: damaged or incomplete ({wrong}); use another checkpoint")
    on_base = any(record.get(kind) for kind in ("lora", "fingerprint", "router"))
    device = "cpu" if base.device.type == "meta" else base.device  # offloaded module by module
    try:
        if frozen:
            adapters = _place_gates(model, tensors, base, device)
        else:
            adapters = _place(model, tensors, base, device, record, on_base)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{weights}: damaged or incomplete ({str(error).splitlines()[0]}); use another checkpoint") from None
    return Student(
        model.eval(), plan, record["sampling"], record["training"], record.get("policy", {}), record.get("lora"), adapters, on_base,
        bool(record.get("router")), record.get("base"),
    )  # fmt: skip


def _place(model: SparseTransformer, tensors: dict, base: torch.nn.Module, device, record: dict, on_base: bool) -> dict | None:
    """Put a student's weights, or what it has beside the base's, in their place; its adapters, if it has any."""
    adapters = None
    if on_base:  # the rest is the model's own
        fused = (".to_qkv.", ".to_kv.", ".to_added_kv.")  # of fuse_qkv_projections, beside the projections that they are made of
        asked = model.state_dict().keys()  # Mochi's text pooler has a to_kv of its own
        own = {f"transformer.{name}": value for name, value in lora.clean_state(base).items() if f"transformer.{name}" in asked or not any(part in name for part in fused)}
        tensors = own | lora.from_diffusers_names(tensors)
    if record.get("lora"):
        adapters = {name: value for name, value in tensors.items() if lora.is_adapter(name)}
        tensors = lora.merged(tensors, record["lora"]["alpha"] / record["lora"]["rank"])
    model.load_state_dict(tensors)
    kinds = {name.replace(".base_layer.", "."): p.dtype for name, p in base.named_parameters()}
    for name, p in model.transformer.named_parameters():  # a bf16 model keeps some parts in fp32
        p.data = p.data.to(kinds[name])
    model.gates.to(base.dtype)
    model.to(device=device).requires_grad_(False)
    return adapters


def _place_gates(model: SparseTransformer, tensors: dict, base: torch.nn.Module, device) -> None:
    """The same where the transformer holds the tensors of a quantised base, which stay as they are."""
    model.gates.load_state_dict({name.removeprefix("gates."): value for name, value in tensors.items() if name.startswith("gates.")})
    model.gates.to(device, next((p.dtype for p in base.parameters() if p.is_floating_point()), torch.float32)).requires_grad_(False)


def check_quantised(path: Path, record: dict, base: torch.nn.Module) -> None:
    """CheckpointError for a student with weights of its own, whole or adapters, on a base whose weights are quantised."""
    if not record.get("router"):
        raise CheckpointError(f"{path}: got a student with weights of its own for a base quantised by {quantised(base)}, accepted: one of a router (optim.train=router), whose weights are the base's; or a base in full precision, and quantise pipe.transformer after usv.enable")
    if lora.adapters_of(base):
        raise CheckpointError(f"{path}: got a quantised base with LoRAs {list(lora.adapters_of(base))}, accepted: load them after usv.enable")


def twin(base: torch.nn.Module) -> torch.nn.Module:
    """The same network in modules of its own, with the very tensors of `base`, of whatever kind they are."""
    tensors = {id(t): t for t in (*base.parameters(), *base.buffers())}
    quantizer = {id(base.hf_quantizer): base.hf_quantizer} if getattr(base, "hf_quantizer", None) is not None else {}
    return copy.deepcopy(base, tensors | quantizer)


def read_weights(path: Path, record: dict) -> dict[str, torch.Tensor]:
    """student.safetensors of a folder, as its config.json says it was written. CheckpointError."""
    file = path / "student.safetensors"
    try:
        tensors = load_file(file)
        changed = record.get("checksum") is not None and checksum(file) != record["checksum"]
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{file}: damaged or incomplete ({error}); use another checkpoint") from None
    wrong = "its checksum is not the one in config.json" if changed else not_finite(tensors)
    if wrong:
        raise CheckpointError(f"{file}: damaged or incomplete ({wrong}); use another checkpoint")
    return tensors


def other_grid(student_sampling: dict, given: dict) -> str | None:
    """A line for a video of another size than the student was trained at; its plan is fractions, which serve any."""
    keys = [key for key in ("height", "width", "num_frames") if None not in (student_sampling.get(key), given.get(key))]
    trained, asked = (tuple(d[key] for key in keys) for d in (student_sampling, given))
    if trained == asked:
        return None
    return f"the student was trained at {', '.join(keys)} = {trained} and runs at {asked}; its plan is fractions of the blocks there are"


def check_fits(what: object, family: str, config: dict, base) -> None:
    """CheckpointError where a student of this family and configuration is not of the model that `base` belongs to."""
    mine = family_of(base)
    if family != mine.name:
        raise CheckpointError(f"{what}: got a student of the family {family} for a {type(base).__name__}, accepted: one of {mine.name}")
    pairs = {key: (_plain(config.get(key)), _plain(dict(base.config)[key])) for key in mine.shape_keys if key in config}
    if differing := [f"{key}: {theirs} against {ours}" for key, (theirs, ours) in pairs.items() if theirs != ours]:
        raise CheckpointError(
            f"{what}: made for another model ({'; '.join(differing)}, checkpoint against model); load it beside the model "
            "it was trained from, or train one for this model"
        )


def _plain(value):
    return list(value) if isinstance(value, (tuple, list)) else value


def save_file_atomic(path: Path, obj) -> None:
    """torch.save, whole or not at all."""
    with replacing(path) as temporary:
        torch.save(obj, temporary)

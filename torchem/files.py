"""Models as files: safetensors with a JSON header that rebuilds the model. No pickle, nothing imported by name.

The header lists the modules of a model, each by the name of its class, with constructor arguments, factors, prior and
small numerical state; tensors follow under their names in the model. A factor that stands in two slots is listed once.
"""

import inspect
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchem import factors, models, priors
from torchem.errors import InvalidFile, TorchemError, describe, invalid, wrong_type
from torchem.factor import Factor, Prior
from torchem.gradient import Gradient
from torchem.model import LatentModel
from torchem.models.nested import Copies, Several
from torchem.models.stationary import Stationary
from torchem.variational import Variational

#: Name and version of the format (2 added priors); a reader refuses versions above its own.
FORMAT, FORMAT_VERSION = "torchem", 2

#: Keys under which constructor arguments that JSON cannot hold are written.
_MODULE, _TENSOR, _TUPLE, _FLOAT = "$module", "$tensor", "$tuple", "$float"

Modules = Mapping[str, Any]


# ---- public -------------------------------------------------------------------------------------------------------


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model to a safetensors file, atomically.

    Args:
        model: Any torchem model; its factors, parameters, frozen masks, priors and numerical state are kept.
        path: File to write or replace.

    Raises:
        InvalidType: If the model or one of its constructor arguments cannot be written.
        InvalidFile: If the file cannot be written.

    Example:
        >>> import tempfile, torchem
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(torchem.GaussianMixture(2, 3), folder + "/m.safetensors")
        ...     load(folder + "/m.safetensors").n_components
        2
    """
    write_atomic(path, to_bytes(model))


def to_bytes(model: nn.Module) -> bytes:
    """The content of the file that `save` writes.

    Raises:
        InvalidType: If the model or one of its constructor arguments cannot be written.
    """
    from safetensors.torch import save as serialize

    from torchem import __version__

    if not isinstance(model, (LatentModel, Factor)):
        raise wrong_type("model", "a torchem model or factor", model, "save other modules with torch.save")
    writer = _Writer(model)
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "torchem_version": __version__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "replicas": list(model.replicas),
        "modules": writer.modules,
    }
    return serialize(writer.tensors | _tensors(model), metadata={FORMAT: json.dumps(header, allow_nan=False)})


def load(path: str | os.PathLike[str], modules: Modules | None = None) -> Any:
    """Rebuild a model from a file that `save` wrote. Nothing in the file is executed or imported.

    Args:
        path: The file.
        modules: Classes (or ready modules) that are not torchem's own, priors among them, by the name of the class, or
            by the slot's name where several share a class.

    Returns:
        The model, on the CPU, in the dtype that it was saved in.

    Raises:
        InvalidFile: If the file is missing, corrupt, foreign, of a newer format, or does not fit its classes.
    """
    header, tensors = _read(Path(path))
    try:
        reader = _Reader(Path(path), header["modules"], tensors, dict(modules or {}))
        model = reader.build(0, "")
        replicas = tuple(header["replicas"])
        if replicas:
            model = _replicated(model, *replicas)
    except (KeyError, IndexError, AttributeError, TypeError, RuntimeError, MemoryError, RecursionError) as error:
        raise _broken(path, "a header that describes a model", f"{type(error).__name__} ({error})") from error
    reader.fill(model, replicas)
    reader.attach_priors(model)
    return model


def write_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that it is there whole or not at all: temporary file beside it, fsync, rename.

    Raises:
        InvalidFile: If the folder does not exist or cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomic(folder + "/a.txt", b"whole")
        ...     Path(folder, "a.txt").read_bytes()
        b'whole'
    """
    target = Path(path)
    temporary: str | None = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _mode(target))
        os.replace(temporary, target)
        temporary = None
        sync_folder(target.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidFile(describe(str(target), "a place to write to", reason, "choose another path")) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename inside a folder durable, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def umask() -> int:
    """The permissions that new files are denied; the system tells them only when they are set."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def to_json(value: Any) -> bytes:
    r"""JSON text of a report: never Infinity or NaN, which JSON does not have, but null.

    Example:
        >>> to_json({"bound": float("nan")})
        b'{\n  "bound": null\n}\n'
    """
    return (json.dumps(_finite(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _finite(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _mode(target: Path) -> int:
    """Permissions of the file that is replaced, or those of a new file under the user's umask."""
    return target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~umask()


# ---- writing ------------------------------------------------------------------------------------------------------


class _Writer:
    """Describes modules, each once, as entries that refer to each other by index."""

    def __init__(self, root: nn.Module):
        self.modules: list[dict[str, Any]] = []
        self.tensors: dict[str, Tensor] = {}
        self._index: dict[nn.Module, int] = {}
        self.add(root)

    def add(self, module: nn.Module) -> int:
        """Index of the module's entry, described now if it was not before."""
        if module in self._index:
            return self._index[module]
        place = self._index[module] = len(self.modules)
        entry: dict[str, Any] = {"class": _NAMES.get(type(module), type(module).__name__)}
        self.modules.append(entry)
        arguments = _arguments(module)
        where = f"{type(module).__name__}.config"
        entry["config"] = None if arguments is None else {k: self._encode(v, where) for k, v in arguments.items()}
        entry["factors"] = {name: self.add(child) for name, child in module.named_children() if _described(child)}
        entry["state"] = _state(module, arguments or {})
        prior = module.prior if isinstance(module, Factor) else None
        if prior is not None:
            entry["prior"] = {"class": type(prior).__name__, "config": self._encode(prior.config(), where)}
        return place

    def _encode(self, value: Any, where: str) -> Any:
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {_FLOAT: repr(value)}
        if isinstance(value, nn.ModuleList):
            return [self._encode(item, where) for item in value]
        if isinstance(value, nn.Module):
            return {_MODULE: self.add(value)}
        if isinstance(value, Tensor):
            name = f"$config.{len(self.tensors)}"
            self.tensors[name] = value.detach().cpu().clone().contiguous()
            return {_TENSOR: name}
        if isinstance(value, tuple):
            return {_TUPLE: [self._encode(item, where) for item in value]}
        if isinstance(value, list):
            return [self._encode(item, where) for item in value]
        if isinstance(value, Mapping) and all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: self._encode(item, where) for key, item in value.items()}
        raise wrong_type(where, "numbers, text, lists, tensors or modules", value, "let config() return those only")


def _described(module: nn.Module) -> bool:
    """Whether a child is rebuilt from the file, rather than by its parent's constructor."""
    return isinstance(module, (Factor, LatentModel))


def _arguments(module: nn.Module) -> dict[str, Any] | None:
    """Constructor arguments; None for foreign modules, which cannot tell theirs."""
    if not _described(module):
        return None
    if isinstance(module, Stationary):
        return {"transition": module.transition}  # the same table as the model's, and listed once
    try:
        return module.config()  # pyright: ignore[reportCallIssue]
    except AttributeError as error:
        raise invalid(
            f"{type(module).__name__}.config", "each constructor argument kept as an attribute of its name", error,
            "keep it, or define config()",
        ) from error  # fmt: skip


def _state(module: nn.Module, arguments: Mapping[str, Any]) -> dict[str, bool | int]:
    """Small numerical state of a factor: its flags and counters that are no arguments."""
    if not isinstance(module, Factor):
        return {}
    public = {k: v for k, v in module.__dict__.items() if not k.startswith("_") and k not in ("training", *arguments)}
    return {name: value for name, value in public.items() if isinstance(value, (bool, int))}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of each distinct module, under their first names."""
    return {
        f"{prefix}.{name}" if prefix else name: tensor.detach().cpu().clone().contiguous()
        for prefix, module in model.named_modules()
        for name, tensor in _own(module)
    }


def _own(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


# ---- reading ------------------------------------------------------------------------------------------------------


def _broken(path: Path | str | os.PathLike[str], expected: str, got: object, remedy: str = "") -> InvalidFile:
    return InvalidFile(describe(str(path), expected, got, remedy or "save the model again, or restore the file"))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file, the header checked as far as its version."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        what = "a folder" if path.is_dir() else "no file"
        raise _broken(path, "a model written by torchem.save", what, "check the path")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(FORMAT)
            if text is None:
                raise _broken(
                    path, "a model written by torchem.save", "tensors without torchem's header",
                    "load it with safetensors, or save the model with torchem.save",
                )  # fmt: skip
            header = _header(path, text)
            # A copy: tensors must not stay tied to a file that may be replaced.
            return header, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _broken(path, "a whole safetensors file", str(error).splitlines()[0]) from error


def _header(path: Path, text: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
        version = header["format_version"]
        known = isinstance(header["modules"], list) and isinstance(header["replicas"], list)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _broken(path, "torchem's header in JSON", f"{type(error).__name__} ({error})") from error
    if not isinstance(version, int) or version < 1 or not known:
        raise _broken(path, "a header with a version and modules", f"version {version!r}")
    if version > FORMAT_VERSION:
        raise _broken(
            path, f"format version {FORMAT_VERSION} or older", f"version {version}",
            f"update torchem (the file was written by {header.get('torchem_version')})",
        )  # fmt: skip
    return header


class _Reader:
    """Builds modules from their entries and fills them with tensors."""

    def __init__(self, path: Path, entries: list[dict[str, Any]], tensors: dict[str, Tensor], given: dict[str, Any]):
        self.path, self.entries, self.tensors, self.given = path, entries, tensors, given
        self.built: dict[int, nn.Module] = {}
        self.state: dict[int, dict[str, bool | int]] = {}

    def build(self, place: int, slot: str) -> Any:
        """The module of an entry; an entry that is referred to twice is one module."""
        if place in self.built:
            return self.built[place]
        entry = self.entries[place]
        parts = {name: self.build(child, f"{slot}.{name}".lstrip(".")) for name, child in entry["factors"].items()}
        module = self._construct(entry, slot)
        for name, part in parts.items():
            if getattr(module, name) is not part:
                setattr(module, name, part)
        self._restore(module, entry)
        self.built[place] = module
        return module

    def _construct(self, entry: dict[str, Any], slot: str) -> nn.Module:
        name, config = entry["class"], entry["config"]
        source = self.given.get(slot, self.given.get(name)) if slot else self.given.get(name)
        source = _OWN.get(name) if source is None else source
        if source is None:
            where = f" (slot {slot!r})" if slot else ""
            raise _broken(
                self.path, "classes of torchem, or passed in", f"class {name!r}{where}",
                f"pass modules={{{name!r}: …}} to load",
            )  # fmt: skip
        if isinstance(source, nn.Module):
            return source
        values = {} if config is None else config
        arguments = {key: self._decode(value, f"{slot}.{key}".lstrip(".")) for key, value in values.items()}
        try:
            return _constructor(source)(**arguments)
        except (TorchemError, ValueError, TypeError) as error:
            raise _broken(self.path, f"arguments that {name} accepts", str(error)) from error

    def _decode(self, value: Any, slot: str) -> Any:
        if isinstance(value, list):
            return [self._decode(item, f"{slot}.{i}") for i, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        for key, read in self._readers(slot).items():
            if value.keys() == {key}:
                return read(value[key])
        return {key: self._decode(item, f"{slot}.{key}") for key, item in value.items()}

    def _readers(self, slot: str) -> dict[str, Callable[[Any], Any]]:
        return {
            _MODULE: lambda place: self.build(place, slot),
            _TENSOR: self.tensors.pop,
            _TUPLE: lambda items: tuple(self._decode(item, slot) for item in items),
            _FLOAT: float,
        }

    def attach_priors(self, model: nn.Module) -> None:
        """Put priors on factors that are complete: a prior looks at what it stands over."""
        built = {module: place for place, module in self.built.items()}
        for module in model.modules():
            place = built.get(module)
            entry = {} if place is None else self.entries[place]
            if entry.get("prior") is None:
                continue
            try:
                name, config = entry["prior"]["class"], self._decode(entry["prior"]["config"], "")
                config = {
                    k: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v for k, v in config.items()
                }
                source = self.given.get(name, _PRIORS.get(name))
                if source is None:
                    raise _broken(
                        self.path, "priors of torchem, or passed in", f"prior {name!r}",
                        f"pass modules={{{name!r}: …}} to load",
                    )  # fmt: skip
                module.prior = source(**config)
            except InvalidFile:
                raise
            except (TorchemError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
                raise _broken(self.path, f"a prior that {entry['class']} accepts", str(error)) from error

    def _restore(self, module: nn.Module, entry: dict[str, Any]) -> None:
        for name, value in entry["state"].items():
            if type(module.__dict__.get(name)) is not type(value) or not isinstance(value, (bool, int)):
                raise _broken(self.path, f"state that {entry['class']} has", f"{name} = {value!r}")
            module.__dict__[name] = value

    def fill(self, model: nn.Module, replicas: tuple[int, ...]) -> None:
        """Put every tensor of the file in its place; none may be missing, left over or of another shape."""
        left = dict(self.tensors)
        for prefix, module in model.named_modules():
            self._thaw(prefix, module, left)
            for name, old in list(_own(module)):
                full = f"{prefix}.{name}" if prefix else name
                if full not in left:
                    raise _broken(self.path, f"a tensor {full!r} of shape {list(old.shape)}", "none")
                new = left.pop(full)
                self._check(full, old, new, module, name, replicas)
                if name in module._parameters:
                    getattr(module, name).data = new
                else:
                    module._buffers[name] = new
        if left:
            raise _broken(self.path, "no tensors but the model's", f"{sorted(left)[0]!r} too")

    def _thaw(self, prefix: str, module: nn.Module, left: Mapping[str, Tensor]) -> None:
        """Make room for masks that `Factor.freeze` left."""
        if not isinstance(module, Factor):
            return
        for parameter, value in list(module.named_parameters(recurse=False)):
            name = f"frozen_{parameter}"
            mask = left.get(f"{prefix}.{name}" if prefix else name)
            if mask is not None and name not in module._buffers:
                fits = mask.shape == value.shape[: mask.dim()]
                module.register_buffer(name, torch.zeros(mask.shape if fits else (), dtype=torch.bool))

    def _check(
        self, full: str, old: Tensor, new: Tensor, module: nn.Module, name: str, replicas: tuple[int, ...]
    ) -> None:
        if name in module._parameters or not isinstance(module, Factor):
            fits = new.shape == old.shape
        else:
            fits = _stretches(old.shape, new.shape, {1, module.n_components}, replicas)
        if not fits:
            raise _broken(self.path, f"{full!r} of shape {list(old.shape)}", f"shape {list(new.shape)}")
        if (old.is_floating_point(), old.dtype == torch.bool) != (new.is_floating_point(), new.dtype == torch.bool):
            raise _broken(self.path, f"{full!r} of kind {old.dtype}", f"{new.dtype}")


def _stretches(old: torch.Size, new: torch.Size, sizes: set[int | None], replicas: tuple[int, ...]) -> bool:
    """Whether a fit can give a buffer this shape: an axis of one may hold a row per component; replicas may lead."""
    lead = len(new) - len(old)
    if lead < 0 or tuple(new[:lead]) not in ((), replicas):
        return False
    return all(a == b or (a == 1 and b in sizes) for a, b in zip(old, new[lead:], strict=True))


def _constructor(source: Any) -> Callable[..., nn.Module]:
    return getattr(source, "rebuild", source)


def _replicated(model: Any, *replicas: int) -> Any:
    if len(replicas) != 1 or not isinstance(replicas[0], int) or replicas[0] < 1:
        raise invalid("replicas", "one positive number", replicas, "save the model again")
    # In place: priors are still to be put on the very modules that were built.
    for module in model.modules():
        if isinstance(module, Factor):
            module.replicate(replicas[0])
    return model


def _classes(package: Any) -> dict[str, type[nn.Module]]:
    found = {name: getattr(package, name) for name in package.__all__}
    return {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, nn.Module)}


#: Classes that a file may name: a factor that shares its name with a model stands under that of its package.
_OWN: dict[str, type[nn.Module]] = {
    **_classes(models),
    **{f"factors.{name}" if name in models.__all__ else name: kind for name, kind in _classes(factors).items()},
    "Copies": Copies,
    "Gradient": Gradient,
    "Several": Several,
    "Stationary": Stationary,
    "Variational": Variational,
}
_NAMES = {kind: name for name, kind in _OWN.items()}
_PRIORS: dict[str, type[Prior]] = {
    name: kind
    for name, kind in vars(priors).items()
    if isinstance(kind, type) and issubclass(kind, Prior) and not inspect.isabstract(kind) and name[0] != "_"
}

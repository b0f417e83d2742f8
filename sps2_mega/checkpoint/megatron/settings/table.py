"""How each setting of a training run is treated: run, harmless at inference, or refused.

The table covers both vocabularies: Megatron-LM's arguments, and the fields of megatron-core's
TransformerConfig and Megatron-Bridge's providers. A setting that is in no list is accepted while
it is off or empty and refused by name otherwise, so that what a later Megatron adds is never
ignored.

    run        `run.py`       decides what is computed; `arguments.py` reads it
    harmless   `harmless_*`   changes no result of a forward pass
    refused    `refused.py`   accepted at the values that have no effect
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sps2_mega.checkpoint.megatron.settings.defaults import DEFAULTS
from sps2_mega.checkpoint.megatron.settings.harmless_model import MODEL, UNDER_REFUSED_SWITCHES
from sps2_mega.checkpoint.megatron.settings.harmless_training import TRAINING
from sps2_mega.checkpoint.megatron.settings.refused import REFUSED
from sps2_mega.checkpoint.megatron.settings.run import ONLY_ARGUMENTS, ONLY_BRIDGE, RUN, SWITCHES
from sps2_mega.errors import ConfigError

Kind = Literal["run", "harmless", "refused"]


@dataclass(frozen=True, slots=True)
class Setting:
    """Treatment of one name; `note` is what it becomes, why it is harmless, or why it is refused.

    `without_effect` are the values at which a refused setting is accepted.
    """

    kind: Kind
    note: str
    without_effect: tuple[Any, ...] = ()


def _table() -> dict[str, Setting]:
    table = {name: Setting("run", note) for name, note in RUN.items()}
    table |= {name: Setting("refused", note, off) for name, (off, note) in REFUSED.items()}
    for subject, names in (MODEL | TRAINING).items():
        table |= {name: Setting("harmless", subject) for name in names.split()}
    return table


SETTINGS: Mapping[str, Setting] = _table()
_UNREPORTED = frozenset(
    " ".join([*TRAINING.values(), *(MODEL[subject] for subject in UNDER_REFUSED_SWITCHES)]).split()
)


def check_settings(args: Mapping[str, Any], where: str) -> None:
    """Refuse what is not run; `where` starts the message.

    Raises:
        ConfigError: names the setting, its value, and the values that are run.
    """
    bridge = of_bridge(args)
    for name, value in args.items():
        setting = SETTINGS.get(name)
        if name in (ONLY_ARGUMENTS if bridge else ONLY_BRIDGE) and not is_empty(value):
            writer = "Megatron-Bridge" if bridge else "Megatron-LM"
            raise ConfigError(
                f"{where}: {name}={short(value)} is not supported: {writer} has no such setting"
            )
        if name in SWITCHES and value not in (None, False, True):
            raise ConfigError(f"{where}: {name}={short(value)} must be true or false")
        if setting is None:
            if not is_empty(value):
                raise ConfigError(
                    f"{where}: {name}={short(value)} is not supported: the setting is not known, "
                    "so it must be off or absent"
                )
        elif setting.kind == "refused" and not _is_one_of(value, setting.without_effect):
            needs = " or ".join(repr(off) for off in setting.without_effect)
            raise ConfigError(
                f"{where}: {name}={short(value)} is not supported: {setting.note} (needs {needs})"
            )


def treated_settings(args: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    """(name, value, treatment) of each setting of the model that is not off or Megatron's default.

    Arguments of the training run alone (data, optimizer, logging, checkpoints) are left out, and so
    are details of a part that the model does not have (experts). The treatment begins with `run`,
    `harmless` or `refused`.
    """
    treated = []
    for name, value in sorted(args.items()):
        setting = SETTINGS.get(name)
        if setting is None:
            if not is_empty(value):
                treated.append((name, value, "refused: the setting is not known"))
        elif setting.kind == "refused":
            if not _is_one_of(value, setting.without_effect):
                treated.append((name, value, f"refused: {setting.note}"))
        elif name not in _UNREPORTED and not _is_default(name, value, setting.kind):
            treated.append((name, value, f"{setting.kind}: {setting.note}"))
    return treated


def of_bridge(args: Mapping[str, Any]) -> bool:
    """Whether the settings are those of Bridge, which name a function for the activation."""
    return args.get("activation_func") is not None


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: None, off, zero, or an empty text or container."""
    return value is None or (
        isinstance(value, (bool, int, float, str, list, tuple, dict, set)) and not value
    )


def short(value: Any, length: int = 100) -> str:
    """A value for a message, on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _is_default(name: str, value: Any, kind: Kind) -> bool:
    if value is None or (kind == "harmless" and is_empty(value)):
        return True
    if name in DEFAULTS:
        return bool(DEFAULTS[name] == value)
    return is_empty(value)


def _is_one_of(value: Any, accepted: Iterable[Any]) -> bool:
    return any(value is off or (type(value) is not bool and value == off) for off in accepted)

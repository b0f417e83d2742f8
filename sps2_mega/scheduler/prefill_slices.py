"""Slices of a prefill pass: how many layers or chunks fit the seconds that a step has.

Pure functions of a group's position and predicted seconds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from sps2_mega.scheduler.prefill_group import PrefillGroup
from sps2_mega.scheduler.step_times import StepTimeModel
from sps2_mega.types import LayerSlice

_SCRAP = 0.25  # of a slice's room


def slice_within(group: PrefillGroup, step_times: StepTimeModel, room_s: float) -> LayerSlice:
    """Slice of about `room_s` seconds, at least one layer or chunk; one where nothing is known."""
    if group.cuts is not None:
        return _chunks_within(group, group.cuts, step_times, room_s)
    layer_s = _layer_s(group, step_times)
    count = 1 if not layer_s else max(1, int(min(room_s / layer_s, 1e6)))
    return group.slice_to(min(step_times.layer_flops.num_layers, group.next_layer + count))


def left_s(group: PrefillGroup, step_times: StepTimeModel) -> float:
    """Expected seconds of the layers left; of a layer that was cut, of the tokens left."""
    layer_flops = step_times.layer_flops
    layer_s = _layer_s(group, step_times)
    if layer_s is None:
        return 0.0
    done = 0.0
    if group.next_token:
        (item,) = group.items
        flops = layer_flops.flops(item.start, item.end)
        done = layer_flops.flops(item.start, group.next_token) / flops
    return (layer_flops.num_layers - group.next_layer - done) * layer_s


def _chunks_within(
    group: PrefillGroup, cuts: Sequence[int], step_times: StepTimeModel, room_s: float
) -> LayerSlice:
    """Rest of the layer and further ones, as far as there is room.

    The next layer is begun only if there is room for more than a scrap of it.
    """
    (item,) = group.items
    layer, token = group.next_layer, group.next_token or item.start
    remaining_s = room_s
    while layer < step_times.layer_flops.num_layers:
        end = step_times.furthest(remaining_s, layer, token, cuts[bisect_right(cuts, token) :])
        seconds = step_times.chunk_s(layer, token, end)
        fits = seconds is not None and max(seconds, _SCRAP * room_s) <= remaining_s
        if layer > group.next_layer and not fits:
            break
        if end < item.end:
            return group.slice_to(layer, end)
        remaining_s -= seconds or remaining_s
        layer, token = layer + 1, item.start
    return group.slice_to(layer)


def _layer_s(group: PrefillGroup, step_times: StepTimeModel) -> float | None:
    """Expected seconds of one layer of the group; a pass that has begun knows best."""
    if group.layer_s is not None:
        return group.layer_s
    return step_times.layer_s(group.flops(step_times.layer_flops))

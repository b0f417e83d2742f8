"""Choice of the library from made-up times; on a GPU every library matches the reference."""

import re

import pytest
import torch
from tolerances import assert_partial_close

from sps2_mega.kernels.attention import choice, reference
from sps2_mega.kernels.attention.choice import DEFAULT, Kind, Speed, fastest, measure
from sps2_mega.kernels.attention.libraries import LIBRARIES

KIND = Kind(torch.device("cpu"), torch.bfloat16, 6, 2, 16)


def right(q, k, v, *, scale, causal):
    out, lse = reference.attend_run(
        *(x.squeeze(0).transpose(0, 1) for x in (q, k, v)),
        scale=scale,
        q_start=0 if causal else k.shape[2],
    )
    return out.transpose(0, 1).unsqueeze(0), lse.T.unsqueeze(0)


def also_right(*qkv, **how):
    return right(*qkv, **how)


def wrong_lse(*qkv, **how):
    out, lse = right(*qkv, **how)
    return out, lse / torch.log(torch.tensor(2.0))


def wrong_shape(*qkv, **how):
    out, lse = right(*qkv, **how)
    return out, lse.unsqueeze(-1)


def not_here(*qkv, **how):
    raise RuntimeError("no kernel for this device\nlong story")


def clock(*seconds):
    """Timer that runs the work and returns these seconds, one after the other."""
    left = list(seconds)

    def timer(work, device):
        work()
        return left.pop(0)

    return timer


def test_a_plan_per_shape_pays_only_for_long_runs():
    speeds = {DEFAULT: Speed(2e-12, 0.0), "cuDNN": Speed(1e-12, 0.32)}
    assert fastest(speeds, 10**9) == DEFAULT  # 1 ms saved per layer, 10 ms to be paid
    assert fastest(speeds, 10**11) == "cuDNN"
    assert fastest({}, 10**11) == DEFAULT


def test_speeds_are_medians_after_the_first_run(caplog):
    libraries = {DEFAULT: right, "cuDNN": also_right}
    timer = clock(0.5, 0.2, 0.9, 0.1, 4.0, 0.1, 0.1, 0.1)
    speeds = measure(KIND, libraries, timer, num_tokens=20)
    assert list(speeds) == [DEFAULT, "cuDNN"]
    assert speeds[DEFAULT].pair_s == pytest.approx(0.2 / 200)
    assert speeds[DEFAULT].new_shape_s == pytest.approx(0.3)
    assert speeds["cuDNN"].new_shape_s == pytest.approx(3.9)
    assert not caplog.records


@pytest.mark.parametrize(
    ("library", "said"),
    [
        (not_here, "without cuDNN: no kernel for this device"),
        (wrong_lse, "LSE differ from those of"),
        (wrong_shape, r"its LSE are \(1, 6, 193, 1\), \(1, 6, 193\) was expected"),
    ],
)
def test_who_fails_or_disagrees_is_left_out(library, said, caplog):
    libraries = {"cuDNN": library, DEFAULT: right}
    speeds = measure(KIND, libraries, clock(0.1, 0.1, 0.1, 0.1), num_tokens=9)
    assert list(speeds) == [DEFAULT]
    (record,) = caplog.records
    assert re.search(said, record.getMessage())


def test_without_the_default_nothing_is_compared(caplog):
    libraries = {DEFAULT: not_here, "cuDNN": right}
    assert measure(KIND, libraries, clock(), num_tokens=9) == {}
    assert "are not compared" in caplog.text


def test_short_runs_are_not_worth_a_measurement(monkeypatch):
    monkeypatch.setitem(LIBRARIES, DEFAULT, right)
    monkeypatch.setattr(choice, "_speeds", lambda kind: pytest.fail("was measured"))
    q, k = torch.randn(1, 6, 33, 16), torch.randn(1, 2, 33, 16)
    out, lse = choice.attend_fastest(q, k, k, scale=0.1, causal=True)
    assert out.shape == q.shape and lse.shape == q.shape[:3]


def test_long_runs_take_the_fastest(monkeypatch):
    monkeypatch.setattr(choice, "_MEASURED_FROM", 16)
    monkeypatch.setattr(
        choice, "_speeds", lambda kind: {DEFAULT: Speed(2e-9, 0.0), "cuDNN": Speed(1e-9, 0.0)}
    )
    monkeypatch.setitem(LIBRARIES, "cuDNN", lambda *qkv, **how: ("cuDNN", how))
    q, k = torch.randn(1, 6, 33, 16), torch.randn(1, 2, 33, 16)
    assert choice.attend_fastest(q, k, k, scale=0.1, causal=True) == (
        "cuDNN",
        {"scale": 0.1, "causal": True},
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 8, 64), (8, 2, 96), (8, 1, 128)])
def test_libraries_equal_the_reference(heads, kv_heads, width, name, dtype):
    kind = Kind(torch.device("cuda"), dtype, heads, kv_heads, width)
    for lengths in ((193, 193, True), (131, 300, False)):
        *run, causal = choice._run(kind, *lengths)
        try:
            found = LIBRARIES[name](*run, scale=0.1, causal=causal)
        except RuntimeError as error:
            pytest.skip(f"{name} is not here: {error}")
        expected = right(*run, scale=0.1, causal=causal)
        assert_partial_close(
            *([x.squeeze(0).transpose(0, 1) for x in pair] for pair in (found, expected))
        )


@pytest.mark.gpu
def test_a_choice_is_made_on_this_device():
    speeds = choice._speeds(Kind(torch.device("cuda"), torch.bfloat16, 32, 8, 128))
    assert DEFAULT in speeds
    assert fastest(speeds, 2**30) in LIBRARIES

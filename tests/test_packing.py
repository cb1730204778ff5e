"""Rounded uploads as bytes: as many as are counted, and the same numbers again."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import patrol_prune as pp
from patrol_prune.defences.quantisation import Quantisation, Quantiser
from patrol_prune.errors import InputError

FORMAT = pp.UploadFormat(3, (2, 2), 1, (0.5, 2.0), (1, 4))
X = torch.rand(5, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def split() -> pp.Split:
    torch.manual_seed(0)
    edge = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Hardswish())
    parts = OrderedDict(edge=edge, cloud=nn.Sequential(nn.Flatten(), nn.Linear(600, 4)))
    return pp.Split(nn.Sequential(parts).eval(), X[:1], at="edge")


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 16), st.lists(st.integers(1, 5), min_size=1, max_size=3),
       st.integers(0, 2**16), st.data())
def test_the_same_numbers_come_back_in_as_many_bytes_as_are_counted(
    bits: int, shape: list[int], seed: int, data: st.DataObject
) -> None:
    drawn = torch.Generator().manual_seed(seed)
    dim = data.draw(st.integers(1, len(shape)))
    quantiser = Quantiser(shape[dim - 1], bits, dim)
    quantiser.calibrate(torch.randn(20, *shape, generator=drawn))
    z = quantiser(3 * torch.randn(4, *shape, generator=drawn))
    made = pp.UploadFormat(bits, tuple(shape), dim, tuple(quantiser.scale.tolist()),
                           tuple(quantiser.zero_point.tolist()))
    uploads = made.pack(z)
    assert {len(upload) for upload in uploads} == {made.upload_bytes}
    assert made.upload_bytes == Quantisation(bits).upload_bytes(shape)
    assert torch.equal(made.unpack(uploads), z)
    assert torch.equal(made.unpack(uploads[2:3]), z[2:3])
    if bits <= 6:  # bfloat16 has 8 bits of its own
        for dtype in (torch.bfloat16, torch.float16):
            half = replace(made, dtype=str(dtype).removeprefix("torch."))
            assert half.pack(z.to(dtype)) == uploads
            assert torch.equal(half.unpack(uploads), z.to(dtype))


def test_the_order_of_the_bits_is_as_told() -> None:
    whole = torch.tensor([[[0, 7], [1, 4]]])
    z = (whole - torch.tensor([1, 4]).view(2, 1)) * torch.tensor([0.5, 2.0]).view(2, 1)
    assert FORMAT.pack(z) == [bytes([0b000_111_00, 0b1_100_0000])]
    assert FORMAT.upload_bytes == 2 and FORMAT.pack(z[:0]) == []


def test_of_a_split_of_one_that_was_saved_and_of_an_export(tmp_path: Path) -> None:
    made = pp.make_defence("quantisation", 4).apply(split(), calibration=X)
    with torch.no_grad():
        z = made.edge(X)
    mine = pp.UploadFormat.of(made)
    assert mine.upload_bytes == 6 * 10 * 10 // 2 and torch.equal(mine.unpack(mine.pack(z)), z)
    pp.save(made, tmp_path / "saved")
    again = pp.load(tmp_path / "saved", lambda: split().model)
    assert pp.UploadFormat.of(again) == mine
    behind = pp.make_defence("quantisation", 4).apply(  # rounds what drops values already
        pp.make_defence("feature_dropout", 0.5).apply(split()), calibration=X)
    assert pp.UploadFormat.of(behind).bits == 4
    path = pp.export(made, tmp_path / "export", formats=("pt2",)).path
    told = json.loads((path / "about.json").read_text())
    assert pp.UploadFormat.from_about(told) == mine
    deployed = pp.load_exported(path)
    assert torch.equal(mine.unpack(mine.pack(deployed.edge(X))), z)


def test_what_an_edge_in_half_precision_sends_goes_into_its_cloud(tmp_path: Path) -> None:
    plain = split()
    halves = pp.Split(plain.model.bfloat16(), X[:1].bfloat16(), at="edge")
    made = pp.make_defence("quantisation", 6).apply(halves, calibration=X.bfloat16())
    sent = pp.UploadFormat.of(made)
    with torch.no_grad():
        z = made.edge(X.bfloat16())
        again = sent.unpack(sent.pack(z))
        assert again.dtype == torch.bfloat16 and made.cloud(again).shape == (5, 4)
    torch.testing.assert_close(again, z, rtol=1e-2, atol=0)
    fine = pp.make_defence("quantisation", 8).apply(halves, calibration=X.bfloat16())
    with pytest.raises(InputError, match="at most 6 bits in bfloat16"):
        pp.UploadFormat.of(fine)
    about = pp.export(fine, tmp_path / "export", formats=("pt2",)).about
    assert "rounded" not in about["edge"]["output"]


def test_what_does_not_round_last_has_no_such_format() -> None:
    for other in (split(), pp.make_defence("feature_dropout", 0.5).apply(
            pp.make_defence("quantisation", 4).apply(split(), calibration=X))):
        with pytest.raises(InputError, match="rounds what it uploads, last of all"):
            pp.UploadFormat.of(other)
    with pytest.raises(InputError, match="calibration="):
        pp.UploadFormat.of(pp.make_defence("quantisation", 4).apply(split()))
    plain: dict[str, Any] = {"edge": {"output": {"shape": [1, 6, 10, 10]}}}
    for about in (plain, {}, None):
        with pytest.raises(InputError, match="something without"):
            pp.UploadFormat.from_about(about)  # type: ignore[arg-type]


@pytest.mark.parametrize(("change", "message"), [
    ({"bits": 0}, "at least 1"), ({"bits": 17}, "at most 16 bits"),
    ({"dimension": 3}, "dimension 3"), ({"scale": (1.0,)}, "1 scales"),
    ({"scale": (1.0, 0.0)}, "above 0"), ({"scale": (1.0, math.nan)}, "above 0"),
    ({"zero_point": (1, 2, 3)}, "3 zero points"),
    ({"bits": 7, "dtype": "bfloat16"}, "at most 6 bits in bfloat16"),
    ({"bits": 10, "dtype": "float16"}, "at most 9 bits in float16"),
])
def test_numbers_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(FORMAT, **change)


def test_what_such_an_edge_does_not_send_is_refused() -> None:
    z = FORMAT.unpack([b"\0\0"])
    for other in (z + 0.1, z - 0.5, z + 100, z * math.nan):
        with pytest.raises(InputError, match="rounded to 3 bits"):
            FORMAT.pack(other)
    for shape in (z[0], z[:, :1], z.tolist()):
        with pytest.raises(InputError, match=r"\[N, 2, 2\] as a tensor"):
            FORMAT.pack(shape)
    for uploads in (b"\0\0", [], [b"\0"], [b"\0\0\0"]):
        with pytest.raises(InputError, match="of 2 bytes each"):
            FORMAT.unpack(uploads)  # type: ignore[arg-type]

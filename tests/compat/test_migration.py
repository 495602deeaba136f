"""Rewriting sources: what changes, what stays as it is, and what a person is told."""

from __future__ import annotations

import ast
import random
import textwrap
import warnings

import libcst
import pytest
import torch

from dilated_attention_pytorch import dilated_attention
from dilated_attention_pytorch.compat.migration.rewrite import rewrite
from dilated_attention_pytorch.compat.migration.uses import unknown_in, uses_in
from dilated_attention_pytorch.compat.table import load

P = "dilated_attention_pytorch"


def migrated(source: str) -> tuple[str, list[tuple[int, str]]]:
    content, findings = rewrite(textwrap.dedent(source).encode())
    ast.parse(content)
    return content.decode(), findings.left


def test_constructor_calls_keep_their_formatting():
    text, left = migrated(
        f'''
        """A module."""
        import os  # first

        # why this class
        from {P}.ring_dilated_attention_v2 import RingDilatedAttentionV2  # trailing

        def build(x: RingDilatedAttentionV2) -> None:
            return RingDilatedAttentionV2(
                segment_lengths=[4, 8],  # rows
                dilation_rates=[1, 2],   # rates
                ring_size=4,
                dropout = 0.5,
            )
        '''
    )
    assert left == []
    assert text == textwrap.dedent(
        f'''
        """A module."""
        import os  # first

        # why this class
        from {P} import DilatedAttention  # trailing

        def build(x: DilatedAttention) -> None:
            return DilatedAttention(
                segment_lengths=[4, 8],  # rows
                dilation_rates=[1, 2],   # rates
                dropout = 0.5,
            )
        '''
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("C([4], [1])", "DilatedAttention([4], [1])"),
        ("C([4], [1], 0.5)", "DilatedAttention([4], [1], dropout=0.5)"),
        ("C(dilation_rates=[1], segment_lengths=[4])", "DilatedAttention(dilation_rates=[1], segment_lengths=[4])"),
        ("C([4], [1], use_tf32=False)", "DilatedAttention([4], [1])"),
        ("f(C([4], [1]), C([8], [2]))", "f(DilatedAttention([4], [1]), DilatedAttention([8], [2]))"),
        ("[C([n], [1]) for n in (4, 8)]", "[DilatedAttention([n], [1]) for n in (4, 8)]"),
    ],
)
def test_bare_classes(before: str, after: str):
    name = "ImprovedDilatedAttention"
    text, left = migrated(
        f"from {P}.improved_dilated_attention import {name}\nx = {before.replace('C(', name + '(')}\n"
    )
    assert left == []
    assert text == f"from {P} import DilatedAttention\nx = {after}\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("(64, 4, [1], [4])", "(64, 4, dilation_rates=[1], segment_lengths=[4], sub_layer_norm=True)"),
        (
            "(64, 4, [1], [4], layer_norm=False, gamma_init=1.0)",
            "(64, 4, dilation_rates=[1], segment_lengths=[4], sub_layer_norm=False)",
        ),
        (
            "(embed_dim=64, num_heads=4, segment_lengths=[4], dilation_rates=[1], bias=False)",
            "(embed_dim=64, num_heads=4, segment_lengths=[4], dilation_rates=[1], bias=False, sub_layer_norm=True)",
        ),
    ],
)
def test_multihead_classes(before: str, after: str):
    name = "MultiheadDilatedAttention"
    text, left = migrated(f"from {P}.dilated_attention import {name} as M\nx = M{before}\n")
    assert left == []
    assert text == f"from {P} import {name} as M\nx = M{after}\n"


def test_what_the_new_calls_compute():
    source = textwrap.dedent(
        f"""
        from {P}.improved_dilated_attention import ImprovedDilatedAttention
        from {P}.dilated_attention import MultiheadDilatedAttention
        a = ImprovedDilatedAttention([4, 8], [1, 2], 0.0, use_tf32=True).eval()
        torch.manual_seed(0)
        m = MultiheadDilatedAttention(32, 4, [1, 2], [4, 8])
        """
    )
    text, left = migrated(source)
    assert left == []
    old, new = {"torch": torch}, {"torch": torch}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(source, old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(text, new)
    x = [torch.randn(1, 16, 4, 8) for _ in range(3)]
    for made in (old["a"](*x), new["a"](*x)):
        assert torch.equal(made, dilated_attention(*x, [4, 8], [1, 2]))
    new["m"].load_state_dict(old["m"].replacement.state_dict())
    y = torch.randn(2, 16, 32)
    assert torch.equal(old["m"](y, y, y)[0], new["m"](y, y, y)[0])


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        ("RingDilatedAttentionV2(**options)", "the call unpacks **options"),
        ("RingDilatedAttentionV2(*lists)", "the call unpacks *lists"),
        ("RingDilatedAttentionV2([4], [1], colour=2)", "colour has no counterpart"),
        ("RingDilatedAttentionV2([4])", "dilation_rates not given"),
        ("classes = [RingDilatedAttentionV2]", "used without being called"),
        ("class Mine(RingDilatedAttentionV2): pass", "used without being called"),
        ("pass", "RingDilatedAttentionV2 is not used here"),
    ],
)
def test_what_cannot_be_decided_stays_under_the_kept_path(use: str, reason: str):
    text, left = migrated(f"from {P}.ring_dilated_attention_v2 import RingDilatedAttentionV2\n\n{use}\n")
    assert text == f"from {P}.compat.old.ring_dilated_attention_v2 import RingDilatedAttentionV2\n\n{use}\n"
    assert len(left) == 1
    assert reason in left[0][1]
    assert left[0][0] in (1, 3)


def test_one_undecided_call_keeps_the_others_as_they_were():
    source = f"from {P}.ring_dilated_attention_v2 import RingDilatedAttentionV2 as R\na = R([4], [1])\nb = R(**o)\n"
    text, left = migrated(source)
    assert text.splitlines()[1:] == source.splitlines()[1:]
    assert [line for line, _ in left] == [3]


def test_tensors_where_pairs_are_returned_now_are_told():
    name = "MultiheadDilatedAttention"
    _, left = migrated(f"from {P}.multihead_dilated_attention import {name}\nm = {name}(64, 4, [1], [4])\n")
    assert "returned a tensor, MultiheadDilatedAttention returns (out, None)" in left[0][1]


def test_modules_attributes_stars_and_strings():
    text, left = migrated(
        f"""
        import {P}.core.factory
        import {P}.ring_dilated_attention_v2 as r
        from {P} import core, dilated_attention
        from {P}.core import *
        made = {P}.core.factory.create_dilated_attention("ring")
        patch("{P}.core.factory.create_dilated_attention")
        """
    )
    assert text == textwrap.dedent(
        f"""
        import {P}.compat.old.core.factory
        import {P}.compat.old.ring_dilated_attention_v2 as r
        from {P} import dilated_attention
        from {P}.compat.old import core
        from {P}.compat.old.core import *
        made = {P}.compat.old.core.factory.create_dilated_attention("ring")
        patch("{P}.core.factory.create_dilated_attention")
        """
    )
    assert [line for line, _ in left] == [2, 3, 4, 5, 7]


def test_an_import_of_several_kinds_becomes_several_lines():
    text, left = migrated(
        f"""
        # before
        from {P} import DilatedPattern, ImprovedDilatedAttention, PatternConfig, RingDilatedAttention  # after
        x = ImprovedDilatedAttention([4], [1]), RingDilatedAttention([4], [1]), PatternConfig()
        """
    )
    assert text == textwrap.dedent(
        f"""
        # before
        from {P} import DilatedAttention, DilatedPattern
        from {P}.compat.old import PatternConfig  # after
        x = DilatedAttention([4], [1]), DilatedAttention([4], [1]), PatternConfig()
        """
    ) or sorted(text.split()) == sorted(
        f"# before from {P} import DilatedAttention, DilatedPattern from {P}.compat.old import PatternConfig # after "
        "x = DilatedAttention([4], [1]), DilatedAttention([4], [1]), PatternConfig()".split()
    )
    assert len(left) == 1


def test_a_name_the_file_uses_for_something_else_is_not_taken():
    text, _ = migrated(
        f"""
        from {P}.improved_dilated_attention import ImprovedDilatedAttention

        class DilatedAttention:
            pass

        pair = DilatedAttention(), ImprovedDilatedAttention([4], [1])
        """
    )
    assert f"from {P} import DilatedAttention as ImprovedDilatedAttention" in text
    assert "pair = DilatedAttention(), ImprovedDilatedAttention([4], [1])" in text


def test_calls_of_todays_classes_with_arguments_of_before():
    text, left = migrated(
        f"""
        from {P} import DilatedAttention, MultiheadDilatedAttention
        a = DilatedAttention([4], [1], attention_dropout=0.1, softmax_scale=2.0)
        b = DilatedAttention([4], [1], dropout=0.1)
        c = MultiheadDilatedAttention(64, 4, [1], [4])
        d = MultiheadDilatedAttention(64, 4, 0.1, segment_lengths=[4], dilation_rates=[1])
        """
    )
    assert left == []
    assert text == textwrap.dedent(
        f"""
        from {P} import DilatedAttention, MultiheadDilatedAttention
        a = DilatedAttention([4], [1], dropout=0.1, scale=2.0)
        b = DilatedAttention([4], [1], dropout=0.1)
        c = MultiheadDilatedAttention(64, 4, dilation_rates=[1], segment_lengths=[4], sub_layer_norm=True)
        d = MultiheadDilatedAttention(64, 4, 0.1, segment_lengths=[4], dilation_rates=[1])
        """
    )


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_sources_without_old_names_are_untouched(newline: str):
    source = f"from {P} import dilated_attention{newline}x = 'ä'  # {P}{newline}".encode()
    assert rewrite(source)[0] == source


def test_other_encodings_and_newlines_stay():
    source = f"# -*- coding: latin-1 -*-\r\nfrom {P}.long_net import LongNet\r\ns = 'ä'\r\n".encode("latin-1")
    assert rewrite(source)[0] == source.replace(b".long_net", b".compat.old.long_net")


def test_imports_of_random_old_names_all_go_and_migrating_again_changes_nothing():
    paths = sorted((module, name) for module, name in load().by_path if module)
    for seed in range(12):
        picked = random.Random(seed).sample(paths, 6)
        lines = [f"from {P}.{module} import {name} as n{i}" for i, (module, name) in enumerate(picked)]
        lines += [f"    from {P}.{module} import (\n        {name},\n    )" for module, name in picked[:1]]
        source = "\n".join([*lines[:6], "def f():", lines[6], "    return n0, n1([4], [1])"]) + "\n"
        assert len(uses_in(source)) == 7
        content, findings = rewrite(source.encode())
        assert uses_in(content) == []
        assert len(findings.left) >= 6
        assert rewrite(content)[0] == content


def test_sources_that_do_not_parse_raise():
    with pytest.raises(libcst.ParserSyntaxError):
        rewrite(f"from {P}.core import (".encode())


def test_names_that_nothing_has_are_listed():
    source = f"""
        from {P} import dilated_attention, Foo
        from {P}.nothing import Bar, Baz
        import {P}.nothing.more
        from {P}.models import Nope, LongNetEncoder
        from {P}.core import _private
        from {P}.nothing import *
        from {P}.core import *
        from {P}.ordering import morton_order
        from {P} import ordering
        from elsewhere import Foo
    """
    source = textwrap.dedent(source)
    names = [(2, "Foo"), (3, "nothing.Bar"), (3, "nothing.Baz"), (4, "nothing.more"), (5, "models.Nope")]
    names += [(6, "core._private"), (7, "nothing")]
    assert unknown_in(source) == [(line, f"{P}.{name}") for line, name in names]
    text, left = migrated(source)
    assert [(line, words.split()[2].rstrip(":")) for line, words in left if words.startswith("unknown name")] == [
        (line, f"{P}.{name}") for line, name in names
    ]
    assert f"from {P}.compat.old.core import _private" in text
    assert f"from {P} import dilated_attention, Foo" in text


def test_old_names_read_from_the_package_are_listed():
    source = (
        f"import {P} as dap, {P}\ndap.RingDilatedAttention\n{P}.DilatedAttention\ndap.nothing.RingDilatedAttention\n"
    )
    text, left = migrated(source)
    assert text == source
    assert [(line, words.split(":")[0]) for line, words in left] == [
        (2, "dap.RingDilatedAttention is an old name read from the package")
    ]

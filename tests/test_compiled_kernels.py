"""What the kernels compile to, for the most part on the H100 and H200, found without a GPU.

The interpreter would run what no compiler takes.
"""

import ast
import importlib.util
import inspect
import itertools
import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import train_gpt as t
from bench import tune
from tests import forked
from tests.support import PATIENCE, lines_of_compile_kernels, process_environment, slow

ROOT = Path(__file__).resolve().parent.parent
# Bytes of shared memory a program may use, on compute capability 9.0, where two are to share a
# multiprocessor, and where one has it.
SHARED_OF_TWO = 115_712
SHARED_OF_ONE = 232_448
FLOAT8_KERNELS = (*t.MLP_TILES, "sum_squares", "round_matrix", "turn_rows")


def compiled(folder: Path, *arguments: str) -> list[dict]:
    """The lines that tests.compile_kernels prints, with a cache of its own in the folder."""
    if t.triton is None:
        pytest.skip("needs triton")
    return [json.loads(line) for line in lines_of_compile_kernels(folder, *arguments)]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[tuple[str, int, bool], dict]:
    lines = compiled(tmp_path_factory.mktemp("triton"), "90")
    return {(line["kernel"], line["state"], line["documents"]): line for line in lines}


def test_every_kernel_compiles_with_both_state_sizes_and_fits(kernels):
    scans = itertools.product(tune.KERNELS, (64, 128), (False, True))
    losses = itertools.product(["cross_entropy_rows"], (0, 1), (False, True))
    products = [(name, 0, False) for name in t.MLP_TILES]
    trellises = [("trellis_paths", states, False) for states in t.TRELLISES]
    rounded = [(name, 8, False) for name in FLOAT8_KERNELS]
    assert set(kernels) == {*scans, *losses, *products, *trellises, *rounded}
    assert max(line["shared"] for line in kernels.values()) <= SHARED_OF_ONE


def test_kernels_without_document_starts_are_the_same_machine_code(kernels):
    """Only what computes decays knows of documents; sums depend on nothing but the instructions."""
    for name in tune.KERNELS:
        for state in (64, 128):
            same = kernels[name, state, False]["code"] == kernels[name, state, True]["code"]
            assert same == (name not in ("tokens_forward", "tokens_backward"))
    codes = {line["code"] for line in kernels.values()}
    scans = len(tune.KERNELS) * 2 + 2 * 2
    others = len(t.TRELLISES) + len(t.MLP_TILES) + len(FLOAT8_KERNELS)
    assert len(codes) == scans + 4 + others


@pytest.mark.parametrize("name", ["scan_forward", "scan_backward"])
def test_two_programs_of_the_scan_share_a_multiprocessor_and_nothing_spills(kernels, name):
    """With state 64, the default's: one program computes while the other waits for its loads."""
    line = kernels[name, 64, False]
    assert line["shared"] <= SHARED_OF_TWO
    assert line["local"] == 0


@pytest.mark.parametrize("slopes", [False, True])
def test_masking_impossible_pairs_takes_no_program_from_a_multiprocessor(kernels, slopes):
    """65,536 registers are three programs' of 128 threads, with 168 each: two, with the 234 that
    masks of both a softcapped logit and its slope took."""
    for masked in (0, 1):
        line = kernels["cross_entropy_rows", masked, slopes]
        assert line["registers"] <= 168
        assert line["local"] == 0


@slow
def test_where_tiles_have_no_instructions_the_default_scan_fits_and_hardly_spills(tmp_path):
    """Of A100 and RTX 40; of others see bench/results/kernels.txt.

    With tensor descriptors and 4 warps a thread of scan_backward had 4,272 local bytes on 8.9.
    """
    capabilities = {"80": 166_912, "89": 101_376}
    lines = compiled(tmp_path, "scans", "16,64,64,64", *capabilities)
    assert [line["capability"] for line in lines] == list(capabilities)
    for line in lines:
        assert set(line["kernels"]) == {"scan_forward", "scan_backward"}
        for needs in line["kernels"].values():
            assert needs["local"] <= 256, line
            assert 50_000 < needs["shared"] <= capabilities[line["capability"]], line


def test_an_idea_changes_the_script_before_it_is_compiled(tmp_path):
    """This one has tiles go by pointers, whose loads are held in other shared memory."""
    idea = tmp_path / "by_pointers.py"
    idea.write_text(
        "def install(script):\n    script.has_tile_instructions = lambda device: False\n"
    )
    words = ("scans", "2,16,16,16", "90")
    (plain,) = compiled(tmp_path, *words)
    (changed,) = compiled(tmp_path, "--idea", str(idea), *words)
    for name in ("scan_forward", "scan_backward"):
        assert plain["kernels"][name]["shared"] != changed["kernels"][name]["shared"]


@pytest.mark.parametrize("states", t.TRELLISES)
def test_a_trellis_costs_are_in_registers(kernels, states):
    assert kernels["trellis_paths", states, False]["local"] == 0


@pytest.mark.parametrize("name", t.MLP_TILES)
def test_the_fused_mlps_products_keep_their_results_in_registers(kernels, name):
    """A tile of 128 x 256 float32 results takes 128 registers of each of its 256 threads."""
    assert kernels[name, 0, False]["local"] == 0
    assert kernels[name, 8, False]["local"] == 0


def test_two_programs_of_the_mlps_gradient_share_a_multiprocessor(kernels):
    assert kernels["mlp_backward", 8, False]["shared"] <= SHARED_OF_TWO


def test_no_kernel_asks_python_for_a_minimum():
    """Of constants triton 3.5, which torch 2.9 has, knows none where a kernel calls another."""
    asked = {}
    for name, kernel in vars(t).items():
        if hasattr(kernel, "fn") and hasattr(kernel, "arg_names"):
            tree = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn)))
            calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
            asked[name] = {call.id for call in calls if isinstance(call, ast.Name)}
    assert {"scan_forward", "store_key_query"} <= set(asked)
    assert {name for name, called in asked.items() if called & {"min", "max"}} == set()


def test_no_kernel_has_8_bit_floats_that_ptxas_spoils(kernels):
    assert not any(line["spoiled"] for line in kernels.values())
    assert not any(line["merged"] for line in kernels.values())


def test_spoiled_pairs_are_found():
    """In what once transposed a matrix whose rounded numbers it had stored."""
    ptx = """
        cvt.rn.satfinite.e4m3x2.f32  %rs1, %r47, %r46;
        cvt.rn.satfinite.e4m3x2.f32  %rs2, %r49, %r48;
        shr.u16 \t%rs17, %rs1, 8;
        mov.b32 \t%r78, {%rs1, %rs2};
    """
    module = "import sys; from tests.compile_kernels import spoiled_pairs as found; "
    code = module + "print(found(sys.argv[1]), found(sys.argv[1].replace('shr', 'shl')))"
    if t.triton is None:
        pytest.skip("needs triton")
    command, environment = [sys.executable, "-c", code, ptx], process_environment({})
    done = forked.run(command, PATIENCE, True, env=environment, cwd=ROOT)
    assert done.stdout.split() == [b"1", b"0"], done.stderr


def test_another_version_of_the_script_has_operators_of_its_own(tmp_path):
    """A compiled graph in a cache calls operators by name: not those of a file that has changed."""
    other = tmp_path / "other_version.py"
    other.write_text(Path(t.__file__).read_text() + "# another byte\n")
    spec = importlib.util.spec_from_file_location("other_version", other)
    module = importlib.util.module_from_spec(spec)
    sys.modules["other_version"] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["other_version"]
    assert module.OPERATORS != t.OPERATORS
    for operators in (t.OPERATORS, module.OPERATORS):
        assert hasattr(getattr(torch.ops, operators), "cross_entropy")
    assert not hasattr(torch.ops.golf, "cross_entropy")

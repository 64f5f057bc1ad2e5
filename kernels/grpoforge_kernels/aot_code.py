"""Machine code as basic blocks: what is executed for each logit, in the loop or on a path through the kernel."""

from __future__ import annotations

import re
from dataclasses import dataclass

SASS_LABEL = re.compile(r"^(\.L\w+):$")
SASS_INSTRUCTION = re.compile(r"^/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
SASS_TARGET = re.compile(r"`\((\.L\w+)\)")
AMD_LABEL = re.compile(r"^(\.LBB\w+):")
AMD_INSTRUCTION = re.compile(r"^([a-z][\w]*)\b\s*([^;]*)")


@dataclass(frozen=True)
class Counts:
    """Instructions that a thread issues, and those of them that are exponentials or stores to global memory."""

    instructions: int
    exponentials: int
    stores: int


@dataclass(frozen=True)
class Block:
    """Instructions without a branch between them."""

    instructions: int
    exponentials: int
    stores: int
    successors: tuple[int, ...]
    can_exit: bool


@dataclass(frozen=True)
class Program:
    """A compiled kernel."""

    registers: int
    spills: int
    local_bytes: int
    shared_bytes: int
    blocks: tuple[Block, ...]

    def loop(self) -> Counts:
        """One turn of the loop that takes the most exponentials."""
        return self._sum(self._turn())

    def path(self, which: str, turns: int, num_exponentials: float, num_stores: float) -> Counts:
        """The ``shortest`` or ``longest`` way through the kernel, whose loop takes ``turns`` turns.

        Only ways with at least that many exponentials and stores; of those the ones with the fewest of either, which
        work on whole vectors without a guard for each element. Branches are taken to be independent of each other.
        """
        turn = set(self._turn())
        weights = [turns if at in turn else 1 for at in range(len(self.blocks))]
        ways = {
            (way.exponentials, way.stores, way.instructions): way
            for way in self._ways(0, weights, {}, ())
            if way.exponentials >= num_exponentials and way.stores >= num_stores
        }
        fewest = min(ways)[:2]
        choose = min if which == "shortest" else max
        return ways[choose(key for key in ways if key[:2] == fewest)]

    def _turn(self) -> list[int]:
        """Blocks of the loop that takes the most exponentials; of loops within each other, the inner one."""
        turns = [
            list(range(start, end + 1))
            for end, block in enumerate(self.blocks)
            for start in block.successors
            if start <= end
        ]
        return max(turns, key=lambda turn: (self._sum(turn).exponentials, -len(turn)), default=[])

    def _sum(self, blocks: list[int]) -> Counts:
        return Counts(
            sum(self.blocks[at].instructions for at in blocks),
            sum(self.blocks[at].exponentials for at in blocks),
            sum(self.blocks[at].stores for at in blocks),
        )

    def _ways(
        self, at: int, weights: list[int], known: dict[int, list[Counts]], above: tuple[int, ...]
    ) -> list[Counts]:
        """What the ways from a block to an exit take, no block twice: the shortest and the longest of each kind."""
        if at in known:
            return known[at]
        block, weight = self.blocks[at], weights[at]
        rests = [Counts(0, 0, 0)] if block.can_exit else []
        for following in block.successors:
            if following not in above and following != at:
                rests += self._ways(following, weights, known, (*above, at))
        extremes: dict[tuple[int, int], list[Counts]] = {}
        for rest in rests:
            way = Counts(
                rest.instructions + weight * block.instructions,
                rest.exponentials + weight * block.exponentials,
                rest.stores + weight * block.stores,
            )
            same = [*extremes.get((way.exponentials, way.stores), ()), way]
            by_length = sorted(same, key=lambda one: one.instructions)
            extremes[way.exponentials, way.stores] = [by_length[0], by_length[-1]]
        known[at] = [way for pair in extremes.values() for way in pair]
        return known[at]


@dataclass(frozen=True)
class _Instruction:
    name: str
    is_counted: bool
    is_exponential: bool
    is_store: bool
    jump: str | None
    """Label to which it jumps; empty when it ends the kernel."""
    is_conditional: bool


def parse_sass(text: str, registers: int, local_bytes: int, shared_bytes: int) -> Program:
    """The disassembly that ``nvdisasm -c`` prints."""
    lines: list[str | _Instruction] = []
    for line in map(str.strip, text.splitlines()):
        label = SASS_LABEL.match(line)
        found = SASS_INSTRUCTION.match(line)
        if label:
            lines.append(label[1])
        elif found and found[2] != "NOP":
            lines.append(_sass_instruction(found[1], found[2], found[3]))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", text))
    return Program(registers, spills, local_bytes, shared_bytes, _blocks(lines))


def _sass_instruction(predicate: str | None, name: str, operands: str) -> _Instruction:
    operation = name.split(".")[0]
    jump = SASS_TARGET.search(operands)
    target = jump[1] if jump and operation == "BRA" else "" if operation in ("EXIT", "RET") else None
    # A branch may carry its condition as an operand: `BRA.U !UP0, ...` or `BRA P0, ...`.
    conditional = predicate is not None or re.match(r"!?U?P\w+,", operands) is not None
    return _Instruction(name, True, name == "MUFU.EX2", operation == "STG", target, conditional)


def parse_amdgcn(text: str, shared_bytes: int) -> Program:
    """The assembly that LLVM prints. Only vector instructions count: scalar ones are issued beside them."""
    lines: list[str | _Instruction] = []
    for line in map(str.strip, text.splitlines()):
        label = AMD_LABEL.match(line)
        if label:
            lines.append(label[1])
        elif line and line[0].islower():
            lines.append(_amd_instruction(line))
        if line.startswith(".Lfunc_end"):
            break
    sizes = {name: int(value) for name, value in re.findall(r"^\s*\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    return Program(
        sizes["vgpr_count"] + sizes.get("agpr_count", 0),
        sizes["vgpr_spill_count"] + sizes["sgpr_spill_count"],
        sizes["private_segment_fixed_size"],
        shared_bytes,
        _blocks(lines),
    )


def _amd_instruction(line: str) -> _Instruction:
    found = AMD_INSTRUCTION.match(line)
    assert found, line
    name, operands = found[1], found[2]
    jump = None
    if name == "s_endpgm":
        jump = ""
    elif name == "s_branch" or name.startswith("s_cbranch"):
        jump = operands.strip()
    store = name.startswith(("global_store", "buffer_store", "flat_store"))
    return _Instruction(
        name, name.startswith("v_"), name.startswith("v_exp_f32"), store, jump, name.startswith("s_cbranch")
    )


def _blocks(lines: list[str | _Instruction]) -> tuple[Block, ...]:
    """Cut at labels and behind jumps. A jump on itself, with which programs are padded, is no loop but an end."""
    groups: list[list[_Instruction]] = [[]]
    at_label: dict[str, int] = {}
    for line in lines:
        if isinstance(line, str):
            if groups[-1]:
                groups.append([])
            at_label[line] = len(groups) - 1
        else:
            groups[-1].append(line)
            if line.jump is not None:
                groups.append([])
    return tuple(_block(group, number, at_label, len(groups)) for number, group in enumerate(groups))


def _block(group: list[_Instruction], number: int, at_label: dict[str, int], num_blocks: int) -> Block:
    successors = []
    last = group[-1] if group else None
    if last is not None and last.jump:
        # Labels of other functions (a routine for slow divisions) are calls that come back.
        target = at_label.get(last.jump, number + 1)
        if not (target == number and len(group) == 1):
            successors.append(target)
    falls_through = last is None or last.jump is None or last.is_conditional
    if falls_through and number + 1 < num_blocks:
        successors.append(number + 1)
    return Block(
        sum(one.is_counted for one in group),
        sum(one.is_exponential for one in group),
        sum(one.is_store for one in group),
        tuple(successors),
        last is not None and last.jump == "",
    )

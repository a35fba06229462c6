"""What a kernel becomes on an Arm machine: LLVM's own IR, lowered by llvmlite, and the loops of the result."""

import re

import llvmlite.binding as llvm

TRIPLE = "aarch64-unknown-linux-gnu"
_LABEL = re.compile(r"(\.L\w+):")
_BRANCH = re.compile(r"\s+(?:b|b\.\w+|cbn?z|tbn?z)\s.*?(\.L\w+)$")


def assembly(ir: str, cpu: str = "neoverse-n1") -> str:
    """The IR of any machine as the assembly of an Arm one; only the header of the IR names the machine."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(TRIPLE).create_target_machine(cpu=cpu, opt=3)
    body = [line for line in ir.splitlines() if not line.startswith("target ")]
    header = [f'target triple = "{TRIPLE}"', f'target datalayout = "{machine.target_data}"']
    return machine.emit_assembly(llvm.parse_assembly("\n".join(header + body)))


def inner_loops(text: str) -> list[str]:
    """The loops that hold no other: from a label to the branch back to it."""
    lines = text.splitlines()
    labels, loops = {}, []
    for i, line in enumerate(lines):
        if label := _LABEL.match(line):
            labels[label[1]] = i
        elif (branch := _BRANCH.match(line)) and branch[1] in labels:
            loops.append((labels[branch[1]], i))
    inner = [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
    return ["\n".join(lines[a : b + 1]) for a, b in inner]

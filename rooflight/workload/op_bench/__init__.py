"""`bench ops`: every operation, by name and shape, forward and backward, beside its roof and the peers present."""

from rooflight.workload.op_bench.measure import Setting, machine_for, run
from rooflight.workload.op_bench.result import BACKWARD, FORWARD, WHOLE, Measured, Result, Row
from rooflight.workload.op_bench.table import OPERATIONS, chosen

__all__ = [
    "BACKWARD",
    "FORWARD",
    "OPERATIONS",
    "WHOLE",
    "Measured",
    "Result",
    "Row",
    "Setting",
    "chosen",
    "machine_for",
    "run",
]

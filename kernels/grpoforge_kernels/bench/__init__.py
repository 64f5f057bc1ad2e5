"""Measuring the operations: correct first, then how fast, against whom, and with how much memory.

`plan.Plan` says what to measure, `report.measure` measures it and returns a report of JSON values, and
`report.compare` relates two reports. Nothing here prints or draws: that is the command's part.
"""

"""What finds private values in a text: one kind of value, one file, one method `find`.

`cotune.sandwich.detector_table.DETECTORS` lists them all.
"""

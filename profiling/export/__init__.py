"""Records in the formats that dashboards read: one module for each, a pure function from records to text.

`series` says what a record is called and which record stands for a case; `formats` has the table of formats.
"""

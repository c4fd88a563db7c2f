"""Benchmarks: how fast Blues is, beside its peers in the same run, with everything that decides the figures on record.

In: options. Out: a record as JSON, a table and a chart. A package here is an area (`data`): it says what is measured of
Blues and of which peers, and leaves processes, rounds, records and the chart to `bench`, `record` and `chart`.
"""

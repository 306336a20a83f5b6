"""When does each level of disaggregation pay? The design space of arXiv 2605.28302 as a tool.

Aggregation with chunked prefill, prefill apart from decode (P/D), attention apart from experts
(AFD), and both. Times come from measured kernels (``kernels``), what travels from ``network``; a
mode (``aggregated``, ``pd``, ``afd``) makes a ``points.Point`` of one configuration, ``search``
looks through all of them. Pure: no Ray, no vLLM. Start reading at ``search``.
"""

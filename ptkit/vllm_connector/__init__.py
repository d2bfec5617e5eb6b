"""Adapters on vLLM: each is a KV prefix that a KV connector writes into a request's first blocks.

These modules run inside vLLM's environment. They import vLLM and what vLLM itself needs, and of
ptkit only what `ptkit.hub.engines.vllm` copies beside them. A request passes them in this order:

    plugin      vLLM's API server finds it as an endpoint plugin; adapters' routes
    requests    a request for an adapter becomes one whose prompt begins with placeholder ids
    library     name -> files, checked for this base, and kept as they were when checked
    connector   the scheduler counts the placeholders as computed, the workers write their blocks
"""

"""The old TransformerLens names that auto-circuit 1.0.1 imports, and only these; for the tests.

auto-circuit was written for TransformerLens 1. There the key-value cache was
`HookedTransformerKeyValueCache`, in `transformer_lens.past_key_value_caching`; TransformerLens 3
renamed it. auto-circuit uses the name in type annotations only. Import this module before
`auto_circuit`.
"""

import sys
import types

import transformer_lens

_OLD_MODULE = "transformer_lens.past_key_value_caching"

transformer_lens.HookedTransformerKeyValueCache = transformer_lens.TransformerLensKeyValueCache
sys.modules[_OLD_MODULE] = types.ModuleType(_OLD_MODULE)
sys.modules[
    _OLD_MODULE
].HookedTransformerKeyValueCache = transformer_lens.TransformerLensKeyValueCache

"""Text in, batches out: tokenizer, corpus (prepare), indexed (Megatron files), mixture, loader.

Import the submodule you need; this file stays empty so that `import pytrain` is quick on ten thousand ranks.
"""

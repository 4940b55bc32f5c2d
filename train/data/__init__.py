"""From files to batches.

sources     files of text, JSON lines and Parquet, and their weights -> documents
documents   the formats {"text"}, {"prompt", "completion"} and {"messages"}
chat        a conversation by the chat template, in trained and other parts
examples    documents -> tokens, and which of them are trained
running_text, packed_examples (packing)      tokens -> the two forms of token files
tokenizing  all of this for a corpus, on all cores
cache       the token files of earlier runs
prepare     --data -> a tokenizer and token files in the checkpoint
preview     one example with its loss mask
batches     token files -> the batch of a step
"""

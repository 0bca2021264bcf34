"""Trains a reward head on CLIP's embeddings of rated or compared images: the work of `ddpo-fast train-reward`.

rows.py         ratings and comparisons from AVA.txt, CSV, JSONL and parquet files
features.py     the images' embeddings, kept on disk
split.py        training and validation rows that share no image and no caption
fit.py          the head's weights
agreement.py    how well predictions agree with what was given, with intervals
"""

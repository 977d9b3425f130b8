"""The head scores of every document of a corpus, in Parquet files that survive a kill."""

from .run import CorpusResult, analyze_corpus

__all__ = ["CorpusResult", "analyze_corpus"]

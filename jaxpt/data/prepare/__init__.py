"""Prepare a corpus: sources -> rules -> deduplication -> train and held-out parquet shards.

Every rule but those that compare documents looks at one text alone, and those that compare look at
small marks. So there are three passes over the texts, whatever the number of rules: read (into
numbered rows on disk), judge (each text alone), write. Between judging and writing, a table of
numbers decides in canonical order which rule drops each document.

Each pass is split into jobs, done in processes here or on a cluster, in any order. What a job
writes depends on the texts and the config alone, and so does the corpus, whatever the workers and
the files of the input. A file gets its name when it is complete, so a killed run continues with the
jobs that were not done.
"""

from jaxpt.data.prepare.corpus import prepare_corpus
from jaxpt.data.prepare.preview import preview_corpus

__all__ = ["prepare_corpus", "preview_corpus"]

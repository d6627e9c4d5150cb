"""Parts of the experiment `benchmarks.experiments.textbooks`: packages, corpora, filters, measures and the page."""

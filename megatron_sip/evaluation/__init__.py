"""Two trained models side by side, on prefixes that neither has seen.

In: two models as Hugging Face folders or checkpoints, and held-out pairs. Out: a ``report.Report`` as tables, JSON and texts to read.

- ``session``      flags -> report: what tools/evaluate.py does
- ``suites``       what an evaluation consists of, and with what it measures
- ``prefixes``     suite: held-out prefixes, ordinary and unsafe
- ``safety``       suite: sets of prompts that invite unsafe text
- ``truthfulqa``, ``halueval``, ``factscore``  suites: factuality, from files of the published form
- ``standard``     suite: lm-eval's tasks; ``standard_data`` their local copies
- ``compare``      what both wrote, and everything that can tell it apart
- ``evaluators``   judges, started one after the other
- ``independence`` is an evaluator one of the judges that trained the run?
- ``folders``      a model as it is named -> a Hugging Face folder, and the settings of its run
- ``models``       a Hugging Face folder: continuations, loss of the original suffixes
- ``likelihoods``  log-probabilities of given answers to given prompts
- ``fact_checks``  splits a text into facts and checks them, by an evaluator
- ``question_files``  files of questions, refused with line and key
- ``prompts``      published sets of prompts -> pairs
- ``statistics``   plain numbers about a continuation; win rates, shares and differences with intervals
- ``embedding``    similarity of two texts under a small sentence-embedding model
- ``toxicity``     probability of a text to be offensive under a small classifier
- ``report``       the tables, the JSON file, continuations side by side
"""


class EvaluationError(RuntimeError):
    """An evaluation that cannot be made; the message names the file or setting and the remedy."""

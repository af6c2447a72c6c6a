from .along import steps_table as steps_table
from .family import find_family as find_family
from .family_results import family_table as family_table
from .optuna_search import search as search
from .results import markdown_table as markdown_table
from .results import results_table as results_table
from .suite import run_suite as run_suite
from .workers import end_with_parent as end_with_parent

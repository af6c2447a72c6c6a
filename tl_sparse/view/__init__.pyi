from .contents import page_data as page_data
from .page import Page as Page
from .tables import circuit_facts as circuit_facts
from .tables import evaluation_tables as evaluation_tables
from .tables import report as report

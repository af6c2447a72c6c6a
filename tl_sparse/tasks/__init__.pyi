from .idioms import idiom_documents as idiom_documents
from .task import TASKS as TASKS
from .task import Task as Task
from .task import TaskData as TaskData
from .task import candidate_logits as candidate_logits
from .task import get_task as get_task
from .task import make_task_data as make_task_data
from .task import task_loss_and_accuracy as task_loss_and_accuracy

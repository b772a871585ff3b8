"""`rag doctor`: looks at this machine and a deployment, and says what is wrong and how to mend it.

A module a check, each with ``check(deployment)`` that gives findings; `deployment` is what they look at. Checks read,
and change nothing. What could crash or print (torch, faiss) is imported in a process of its own (`probe`).
"""

from services.doctor.deployment import Deployment
from services.doctor.examination import examine
from services.doctor.finding import Finding, Report

__all__ = ["Deployment", "Finding", "Report", "examine"]

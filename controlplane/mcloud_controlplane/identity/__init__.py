"""Identity: who may do what where; tokens, projects, users, roles, credentials, enrolment."""

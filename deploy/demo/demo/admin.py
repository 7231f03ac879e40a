"""The demo's rows in Django's admin."""

from django.contrib import admin

from demo.models import ExampleTask


@admin.register(ExampleTask)
class ExampleTaskAdmin(admin.ModelAdmin):
    """Shows what was asked for beside what came out."""

    list_display = ("message", "created_at", "completed_at", "final_value")
    readonly_fields = ("created_at", "updated_at", "completed_at", "final_value")

from django.db import migrations


class Migration(migrations.Migration):

    dependencies = [
        ('taskkit', '0002_results'),
    ]

    operations = [
        migrations.AlterModelOptions(
            name='run',
            options={
                'ordering': ('-id',),
                'permissions': [
                    ('cancel_run', 'Can cancel run'),
                    ('replay_run', 'Can perform run again'),
                    ('release_run', 'Can release run from quarantine'),
                ],
                'verbose_name': 'run',
                'verbose_name_plural': 'runs',
            },
        ),
    ]

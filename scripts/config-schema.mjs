// Writes config.schema.json, by which editors check and complete configuration files, from the schema in src/config.ts.

import { writeFileSync } from 'node:fs';
import { configJsonSchema } from '../dist/config-file.js';

writeFileSync(
  new URL('../config.schema.json', import.meta.url),
  `${JSON.stringify(configJsonSchema(), null, 2)}\n`,
);

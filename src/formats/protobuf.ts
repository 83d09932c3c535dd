/** Message types for protobufjs from tables with a schema's own names and field numbers. */
import protobuf from 'protobufjs/light.js';

export type Field = [type: string, number: number, rule?: 'repeated'];
export type Messages = Readonly<Record<string, Readonly<Record<string, Field>>>>;

/**
 * @param syntax proto2 packs repeated numbers only where told to, proto3 all of them
 */
export function buildSchema(messages: Messages, syntax: 'proto2' | 'proto3'): protobuf.Root {
  const root = new protobuf.Root();
  for (const [name, fields] of Object.entries(messages)) {
    const type = new protobuf.Type(name);
    for (const [field, [fieldType, number, rule]] of Object.entries(fields)) {
      const packed =
        syntax === 'proto3' && rule === 'repeated' && fieldType in protobuf.types.packed;
      type.add(
        new protobuf.Field(field, number, fieldType, rule, undefined, {
          ...(packed && { packed }),
        }),
      );
    }
    root.add(type);
  }
  root.resolveAll();
  return root;
}

/** A state for checkpoints whose tensors alone matter. */
import type { CheckpointState } from '../../src/train/checkpoint.js';

export function stateOf(step: number): Omit<CheckpointState, 'format'> {
  return {
    step,
    epoch: 1,
    stepInEpoch: step,
    seconds: 1.5,
    epochProgress: null,
    validations: [{ epoch: 1, step: 1, accuracy: 0.75 }],
    config: { lr: 0.01 },
    configHash: 'abc',
    data: { images: 3, identities: 2, sha256: 'def' },
    environment: { device: 'CPU' },
  };
}

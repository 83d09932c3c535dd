/** Image folders: one sub-folder per identity, in it JPEG and PNG files and nothing else. */
import { createHash } from 'node:crypto';
import { realpath } from 'node:fs/promises';
import { join } from 'node:path';
import { type DataOptions, throwIfAborted } from './files.js';
import { dataError, fileSet, type ImageFile, type ImageSource } from './image-source.js';
import { IMAGE_NAME, listFolder } from './list-folder.js';

interface DatedFile extends ImageFile {
  modifiedNs: bigint;
}

interface ImageFolder {
  /** In byte order: position is the label. */
  names: string[];
  /** In byte order within each identity. */
  files: DatedFile[];
}

/** Lists an image folder: one sub-folder per identity, in it JPEG and PNG files and nothing else. */
async function scanFolder(path: string, options: DataOptions): Promise<ImageFolder> {
  const root = await realpath(path);
  const entries = await listFolder(root, root);
  const loose = entries.find((entry) => entry.stats.isFile() && IMAGE_NAME.test(entry.name));
  if (loose !== undefined) {
    throw dataError(
      `${join(path, loose.name)} lies outside any identity's folder: an image folder holds one sub-folder per identity with its images, so give the folder above, or move the image into a sub-folder.`,
    );
  }
  const folders = entries.filter((entry) => entry.stats.isDirectory());
  const files: DatedFile[] = [];
  for (const [identity, folder] of folders.entries()) {
    throwIfAborted(options.signal, 'reading the image folder');
    const images = await listFolder(join(root, folder.name), root);
    if (images.length === 0) {
      throw dataError(`${join(path, folder.name)} holds no images: add some or delete the folder.`);
    }
    for (const image of images) {
      const name = `${folder.name}/${image.name}`;
      if (!image.stats.isFile() || !IMAGE_NAME.test(image.name)) {
        throw dataError(
          `${join(path, name)} is not a .jpg, .jpeg or .png file: an identity's folder holds its images and nothing else, so move it away.`,
        );
      }
      files.push({
        name,
        identity,
        bytes: Number(image.stats.size),
        modifiedNs: image.stats.mtimeNs,
      });
    }
    options.onProgress?.({ phase: 'scanning', done: identity + 1, total: folders.length });
  }
  if (files.length === 0) {
    throw dataError(
      `${path} holds no images: give a folder with one sub-folder per identity and JPEG or PNG images in it.`,
    );
  }
  return { names: folders.map((folder) => folder.name), files };
}

/** Changes when any image is added, removed, renamed or written. */
function fingerprint(folder: ImageFolder): string {
  // 'pack 1': what packing does to an image; raise it when that changes.
  const hash = createHash('sha256').update('hardmine pack 1\0');
  for (const file of folder.files) hash.update(`${file.name}\0${file.bytes} ${file.modifiedNs}\0`);
  return hash.digest('hex').slice(0, 32);
}

/** An image folder as packing and inspection see it; labels are the byte order of the names. */
export async function folderSource(path: string, options: DataOptions): Promise<ImageSource> {
  const folder = await scanFolder(path, options);
  return {
    ...fileSet(path, folder.files, folder.names),
    fingerprint: fingerprint(folder),
    notes: [],
  };
}
